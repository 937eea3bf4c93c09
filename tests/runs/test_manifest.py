"""A folder appears whole or not at all, and every difference from its manifest is reported."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tinylab.errors import CheckpointError
from tinylab.runs import manifest
from tinylab.runs.manifest import commit_folder, leftovers, read_manifest, temporary_folder, verify_folder

COMMIT = """
import sys
from pathlib import Path
from tinylab.runs.manifest import commit_folder, temporary_folder
target = Path(sys.argv[1])
temporary = temporary_folder(target)
(temporary / "a.bin").write_bytes(b"12345")
(temporary / "deep" / "er").mkdir(parents=True)
(temporary / "deep" / "er" / "b.txt").write_text("text")
commit_folder(temporary, target)
"""
# SHA-256 of "12345", computed with sha256sum
DIGEST = "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    temporary = temporary_folder(tmp_path / "step-1")
    (temporary / "a.bin").write_bytes(b"12345")
    (temporary / "deep" / "er").mkdir(parents=True)
    (temporary / "deep" / "er" / "b.txt").write_text("text")
    commit_folder(temporary, tmp_path / "step-1")
    return tmp_path / "step-1"


def test_a_committed_folder_verifies_and_lists_every_file(committed: Path):
    assert verify_folder(committed) == []
    assert set(read_manifest(committed)) == {"a.bin", "deep/er/b.txt"}
    assert read_manifest(committed)["a.bin"] == {"bytes": 5, "sha256": DIGEST}
    assert [p.name for p in committed.parent.iterdir() if p.name.startswith(".")] == []


def test_altered_truncated_missing_and_extra_files_are_all_reported(committed: Path):
    (committed / "a.bin").write_bytes(b"12346")
    (committed / "deep" / "er" / "b.txt").write_text("tex")
    (committed / "extra").write_text("x")
    assert verify_folder(committed) == [
        f"{committed / 'a.bin'}: SHA-256 differs from the manifest",
        f"{committed / 'deep/er/b.txt'}: 4 bytes expected, 3 found",
        f"{committed / 'extra'}: file that the manifest does not list",
    ]
    (committed / "a.bin").unlink()
    assert verify_folder(committed)[0] == f"{committed / 'a.bin'}: missing"


def test_directories_links_and_special_files_that_do_not_belong_are_reported(committed: Path):
    (committed / "hollow").mkdir()
    (committed / "more" / "deeper").mkdir(parents=True)
    (committed / "more" / "note").write_text("x")
    for name in ("a.bin", "manifest.json"):  # the same bytes, elsewhere
        (committed / name).rename(committed.parent / name)
        (committed / name).symlink_to(committed.parent / name)
    (committed / "loop").symlink_to(committed)
    (committed / "deep" / "er" / "b.txt").unlink()
    os.mkfifo(committed / "deep" / "er" / "b.txt")
    assert verify_folder(committed) == [
        f"{committed / 'a.bin'}: symbolic link in place of a file",
        f"{committed / 'deep/er/b.txt'}: special file in place of a file",
        f"{committed / 'hollow'}: empty directory that the manifest does not list",
        f"{committed / 'loop'}: symbolic link that the manifest does not list",
        f"{committed / 'manifest.json'}: symbolic link in place of a file",
        f"{committed / 'more'}: directory that the manifest does not list",
        f"{committed / 'more/deeper'}: empty directory that the manifest does not list",
        f"{committed / 'more/note'}: file that the manifest does not list",
    ]


def test_a_linked_directory_is_reported_and_not_looked_into(committed: Path):
    (committed / "deep").rename(committed.parent / "deep")
    (committed / "deep").symlink_to(committed.parent / "deep")
    assert verify_folder(committed) == [
        f"{committed / 'deep'}: symbolic link in place of a directory",
        f"{committed / 'deep/er/b.txt'}: missing",
    ]


def test_progress_counts_every_byte(committed: Path):
    said: list[tuple[int, int]] = []
    assert verify_folder(committed, progress=lambda done, total: said.append((done, total))) == []
    assert said == [(5, 9), (9, 9)]


def test_a_file_that_cannot_be_read_is_reported_with_the_others(committed: Path, monkeypatch):
    def unreadable(path: Path) -> str:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(manifest, "sha256_file", unreadable)
    assert [p.split(": ")[1] for p in verify_folder(committed)] == ["unreadable (Input/output error)"] * 2


def test_what_may_not_be_read_is_not_called_damaged(committed: Path, monkeypatch):
    def forbidden(path: Path) -> str:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(manifest, "sha256_file", forbidden)
    with pytest.raises(PermissionError):
        verify_folder(committed)


def test_a_directory_that_cannot_be_read_is_reported_and_one_that_may_not_be_read_is_not(committed: Path, monkeypatch):
    listed = os.scandir

    def refusing(number: int):
        def scandir(path):
            if str(path).endswith("deep"):
                raise OSError(number, os.strerror(number), str(path))
            return listed(path)

        return scandir

    monkeypatch.setattr(os, "scandir", refusing(5))
    assert f"{committed / 'deep'}: unreadable (Input/output error)" in verify_folder(committed)
    monkeypatch.setattr(os, "scandir", refusing(13))
    with pytest.raises(PermissionError):
        verify_folder(committed)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"a": {"bytes": "5", "sha256": "x"}}}']
)
def test_a_malformed_manifest_is_refused_by_name(committed: Path, text):
    (committed / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step-1/manifest\.json must"):
        verify_folder(committed)


def test_a_folder_without_manifest_was_never_committed(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"manifest\.json must exist in a committed folder.*the save never ended"):
        verify_folder(tmp_path)


def test_names_that_lead_out_of_the_folder_are_never_opened(committed: Path):
    outside = committed.parent / "secret"
    outside.write_text("12345")
    content = {"files": {"../secret": {"bytes": 5, "sha256": DIGEST}}}
    (committed / "manifest.json").write_text(json.dumps(content))
    assert f"{committed / '../secret'}: missing" in verify_folder(committed)


def test_a_commit_never_replaces_a_folder(committed: Path):
    temporary = temporary_folder(committed)
    (temporary / "a.bin").write_text("other")
    with pytest.raises(CheckpointError, match="step-1 must not exist before it is committed; move it aside"):
        commit_folder(temporary, committed)
    assert verify_folder(committed) == []


def test_a_temporary_folder_starts_empty_whatever_a_kill_left(tmp_path: Path):
    left = temporary_folder(tmp_path / "step-1")
    (left / "half").write_text("x")
    assert list(temporary_folder(tmp_path / "step-1").iterdir()) == []
    assert not left.exists()


def test_only_what_a_vanished_process_of_this_host_left_is_removed(tmp_path: Path):
    """Two nodes may prepare in one place: neither may delete the work of the other."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    host, other = socket.gethostname(), os.getppid()
    for owner in (f"{host}.{gone.pid}", f"{host}.{other}", f"elsewhere.{gone.pid}"):
        for target in ("data", "data.old"):
            (tmp_path / f".tmp-{target}.{owner}.0123abcd" / "half").mkdir(parents=True)
    assert leftovers(tmp_path) == [tmp_path / f".tmp-{t}.{host}.{gone.pid}.0123abcd" for t in ("data.old", "data")]
    made = temporary_folder(tmp_path / "data")
    left = {p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp-data.")} - {made.name}
    assert left == {
        f".tmp-data.{host}.{other}.0123abcd",
        f".tmp-data.elsewhere.{gone.pid}.0123abcd",
        f".tmp-data.old.{host}.{gone.pid}.0123abcd",
        f".tmp-data.old.{host}.{other}.0123abcd",
        f".tmp-data.old.elsewhere.{gone.pid}.0123abcd",
    }


def test_more_keys_stand_beside_the_files(tmp_path: Path):
    temporary = temporary_folder(tmp_path / "data")
    (temporary / "a").write_text("x")
    commit_folder(temporary, tmp_path / "data", {"fingerprint": "f"})
    content = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert (content["version"], content["fingerprint"], list(content["files"])) == (1, "f", ["a"])
    assert verify_folder(tmp_path / "data") == []


@pytest.mark.parametrize(
    ("point", "complete"),
    [
        ("commit.files_synced", False),
        ("commit.manifest_written", False),
        ("commit.renamed", True),
        ("commit.parent_synced", True),
    ],
)
def test_a_kill_at_any_point_of_a_commit_leaves_all_or_nothing(tmp_path: Path, point, complete):
    target = tmp_path / "step-1"
    environment = {**os.environ, "TINYLAB_FAILPOINT": point}
    done = subprocess.run([sys.executable, "-c", COMMIT, str(target)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.exists() == complete
    if not complete:
        subprocess.run([sys.executable, "-c", COMMIT, str(target)], check=True)
    assert verify_folder(target) == []
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["step-1"]


def test_every_file_and_every_folder_reaches_the_device_before_the_rename(tmp_path: Path, monkeypatch):
    events: list[str] = []
    temporary = temporary_folder(tmp_path / "step-1")
    (temporary / "deep" / "er").mkdir(parents=True)
    (temporary / "deep" / "er" / "b.txt").write_text("text")
    rename = os.rename
    monkeypatch.setattr(manifest, "fsync_path", lambda path: events.append(path.relative_to(tmp_path).as_posix()))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    commit_folder(temporary, tmp_path / "step-1")
    before = events[: events.index("rename")]
    for path in ("deep/er/b.txt", "deep/er", "deep", "."):
        assert (Path(temporary.name) / path).as_posix() in before
    assert events[-1] == "."
