"""Files that survive a kill: whole or absent, torn lines found and cut, full disks named."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tinylab.errors import CheckpointError
from tinylab.runs.durable import append_line, disk_error, read_lines, repair_tail, write_atomic


def test_write_atomic_leaves_the_new_content_and_no_temporary_file(tmp_path: Path):
    path = tmp_path / "status.json"
    write_atomic(path, "old")
    write_atomic(path, b"new", sync=False)
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
    assert path.read_bytes() == b"new"


def test_a_failed_write_keeps_the_old_file_and_removes_its_own(tmp_path: Path, monkeypatch):
    path = tmp_path / "status.json"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"status\.json: No space .*\(3 bytes needed, \d+ bytes free\)"):
        write_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
    assert path.read_text() == "old"


def test_lines_are_read_by_offset_and_a_torn_one_waits(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == ([], 0)
    append_line(path, {"step": 1, "text": "é\r\u2028"}, sync=True)
    records, offset = read_lines(path)
    assert (records, offset) == ([{"step": 1, "text": "é\r\u2028"}], path.stat().st_size)
    with open(path, "ab") as file:
        file.write(b'{"step": 2')
    assert read_lines(path, offset) == ([], offset)
    with open(path, "ab") as file:
        file.write(b'}\n{"st')
    records, further = read_lines(path, offset)
    assert records == [{"step": 2}] and further == path.stat().st_size - 4


def test_a_damaged_complete_line_is_named(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "a"}\nnot json\n')
    with pytest.raises(CheckpointError, match=r"journal\.jsonl, line 2 after byte 0 must be a JSON .* b'not json'"):
        read_lines(path)
    path.write_text("[1]\n")
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        read_lines(path)


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 3, "loss": 1.'])
def test_repair_cuts_the_torn_line_and_no_other_byte(tmp_path: Path, torn):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + torn)
    repair_tail(path)
    assert path.read_bytes() == whole
    path.write_bytes(torn)
    repair_tail(path)
    assert path.read_bytes() == b""
    repair_tail(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_line_cut_short_by_a_full_disk_leaves_nothing_behind(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    append_line(path, {"event": "started"}, sync=True)
    before, size = resource.getrlimit(resource.RLIMIT_FSIZE), path.stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, before[1]))  # room for nine bytes of it
        with pytest.raises(CheckpointError, match=r"cannot write .*journal\.jsonl: File too large"):
            append_line(path, {"event": "committed"}, sync=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == size
    append_line(path, {"event": "failed"}, sync=True)
    assert [line["event"] for line in read_lines(path)[0]] == ["started", "failed"]


def test_numbers_that_json_does_not_know_are_never_written(tmp_path: Path):
    with pytest.raises(ValueError, match="Out of range float"):
        append_line(tmp_path / "metrics.jsonl", {"loss": float("nan")}, sync=False)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_write_without_permission_names_the_path():
    error = disk_error(Path("/somewhere/file"), PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    assert str(error) == "cannot write /somewhere/file: Permission denied; check the path and its permissions"


def test_a_full_disk_that_a_rust_library_found_is_one_too(tmp_path: Path):
    """safetensors says: Error while serializing: I/O error: No space left on device (os error 28)."""
    error = disk_error(tmp_path / "x", OSError(None, "Error while serializing: No space (os error 28)"), 7)
    assert str(error).startswith(f"cannot write {tmp_path / 'x'}: No space left on device (7 bytes needed, ")
    assert str(error).endswith("bytes free); make room and repeat the same command")


@pytest.mark.parametrize("hit", [1, 3])
def test_a_failpoint_kills_at_its_hit_and_nowhere_else(tmp_path: Path, hit):
    code = "import sys; from tinylab.runs.durable import failpoint\n"
    code += "for i in range(5): failpoint('other'); failpoint('here'); print(i, flush=True)"
    environment = {**os.environ, "TINYLAB_FAILPOINT": f"here:{hit}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert json.loads("[" + ",".join(done.stdout.split()) + "]") == list(range(hit - 1))
