"""The command line with streams as shells and job systems leave them: closed, ASCII, a reader that went away."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from tinylab.cli import command
from tinylab.cli.command import main
from tinylab.cli.output import Answer

FAKE = """
import sys, tinylab.cli.command as c
from tinylab.cli.output import Answer
def verb():
    for i in range(3):
        print("working", file=sys.stderr, flush=True)
    return Answer({"text": "é → \U0001f999"}, "é → done")
c._verb_function = lambda name: verb
sys.exit(c.main(sys.argv[1:]))
"""


def fake(*arguments: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A verb that talks on both streams, started by a shell with `redirect`."""
    line = ["sh", "-c", f'"$@" {redirect}', "sh", sys.executable, "-c", FAKE, "runs", *arguments]
    return subprocess.run(line, capture_output=True, env=os.environ | environment)


def test_work_goes_on_when_the_reader_of_its_messages_leaves():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", FAKE, "runs"], stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert done.returncode == 0
    assert done.stdout.decode() == "é → done\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_work_goes_on_when_the_disk_under_its_messages_is_full():
    done = fake(redirect="2>/dev/full")
    assert (done.returncode, done.stdout.decode()) == (0, "é → done\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_closed_from_the_start_is_like_one_that_nobody_reads(closed: str):
    done = fake(redirect=closed)
    assert done.returncode == 0
    assert done.stdout.decode() == ("" if " >" in f" {closed}" else "é → done\n")
    assert b"defect" not in done.stderr


def test_a_stream_that_takes_only_ascii_gets_escapes_and_valid_json():
    assert fake(PYTHONIOENCODING="ascii").stdout == b"\\xe9 \\u2192 done\n"
    assert json.loads(fake("--json", PYTHONIOENCODING="ascii").stdout) == {"text": "é → \U0001f999"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_control_characters_instead_of_obeying_them(monkeypatch: pytest.MonkeyPatch):
    answer = Answer(None, "a\tb\n\x1b[2J\x00\x9b")
    monkeypatch.setattr(command, "_verb_function", lambda name: lambda: answer)
    for stream, wanted in ((Terminal(), "a\tb\n\\x1b[2J\\x00\\x9b\n"), (io.StringIO(), f"{answer.text}\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["runs"]) == 0
        assert stream.getvalue() == wanted
