"""Where a run comes from, without secrets."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tinylab.runs.provenance import git_state, processor_features, provenance
from tinylab.runs.secrets import redact


def test_secret_values_never_reach_the_command_line_that_is_kept():
    kept = redact(
        [
            "tinylab",
            "--hub-token",
            "abc",
            "--api_key=def",
            "--set",
            "logger.password=ghi",
            "--note",
            "hf_abcdefghijklmnopqrst",
            "https://user:secret@host/x",
            "--tokens",
            "200K",
            "--seed=3",
        ]
    )
    assert kept == [
        "tinylab",
        "--hub-token",
        "***",
        "--api_key=***",
        "--set",
        "logger.password=***",
        "--note",
        "***",
        "https://***@host/x",
        "--tokens",
        "200K",
        "--seed=3",
    ]


def test_provenance_is_plain_and_names_versions_machine_and_command():
    found = json.loads(json.dumps(provenance()))
    assert found["packages"]["torch"] and found["python"].count(".") == 2
    assert found["machine"]["cores"] >= 1 and found["command"]
    assert found["machine"]["features"] == sorted(processor_features())


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path):
    assert git_state(tmp_path) is None
    environment = os.environ | {f"GIT_{w}_{k}": "x@y" for w in ("AUTHOR", "COMMITTER") for k in ("NAME", "EMAIL")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
