"""Where a run comes from: commit, package versions, machine and command, with secrets left out."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tinylab.runs.secrets import redact

_VECTOR = re.compile(r"sse|avx|fma|f16c|amx|asimd|sve|sme|bf16|i8mm|vnni")
"""Features that decide how a sum is split and rounded."""
PACKAGES = ("tinylab", "torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "gigatoken", "datasets")


def provenance() -> dict[str, Any]:
    """What `provenance.json` holds: time (Unix s), git commit of the package (None outside a checkout), Python and
    package versions, machine, command line with secrets replaced by `***`.
    """
    return {
        "time": time.time(),
        "git": git_state(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": processor(),
            "features": processor_features(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "command": redact(sys.argv),
    }


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that `folder` is the root of, and whether tracked files differ from it; None if none."""
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def processor_features() -> list[str]:
    """The vector instructions of the processor as the kernel names them, sorted; empty where it does not say."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return sorted(name for name in (found[1].split() if found else []) if _VECTOR.search(name))


def processor() -> str:
    """The processor's name as the kernel reports it, else its kind."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
