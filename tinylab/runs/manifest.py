"""SHA-256 manifests and the commit protocol: a folder appears whole, or not at all.

Committed means: files fsynced, `manifest.json` written and fsynced, folder renamed from a temporary name,
parent fsynced, and only then the journal line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from tinylab.errors import CheckpointError
from tinylab.runs.durable import disk_error, failpoint, fsync_path, write_atomic

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_folder(target: Path) -> Path:
    """A fresh, empty folder beside `target` to fill before `commit_folder`. Raises CheckpointError if impossible."""
    folder = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    return folder


def commit_folder(temporary: Path, target: Path, extra: dict[str, Any] | None = None) -> None:
    """Fsync every file, write the manifest last, and rename `temporary` to `target`, which must not exist.

    `extra` keys stand in the manifest beside `files`.
    """
    if target.exists():
        raise CheckpointError(f"{target} must not exist before it is committed; move it aside and repeat the command")
    try:
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for path in files:
            fsync_path(path)
        failpoint("commit.files_synced")
        entries = {
            p.relative_to(temporary).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files
        }
        write_atomic(temporary / MANIFEST, json.dumps({"version": 1, **(extra or {}), "files": entries}, indent=1))
        for folder in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
            fsync_path(folder)
        failpoint("commit.manifest_written")
        os.rename(temporary, target)
        failpoint("commit.renamed")
        fsync_path(target.parent)
        failpoint("commit.parent_synced")
    except OSError as error:
        raise disk_error(target, error) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's `files`. Raises CheckpointError when it is missing or malformed, PermissionError if forbidden."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} must exist in a committed folder; found none: the save never ended") from None
    except PermissionError:
        raise  # no damage: nothing is known about the content
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be a readable manifest; found: {error}") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("bytes"), int) and isinstance(e.get("sha256"), str)
        for e in files.values()
    ):
        raise CheckpointError(f"{path} must hold bytes and sha256 of each file under `files`; found otherwise")
    return files


def verify_folder(folder: Path) -> list[str]:
    """Every difference between `folder` and its manifest, one line each; empty when it holds.

    Raises CheckpointError when there is no readable manifest, PermissionError for what may not be read.
    """
    expected = read_manifest(folder)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    problems = [f"{folder / name}: in the manifest, not on disk" for name in sorted(set(expected) - present)]
    problems += [f"{folder / name}: on disk, not in the manifest" for name in sorted(present - set(expected))]
    for name in sorted(present & set(expected)):
        path, entry = folder / name, expected[name]
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                problems.append(f"{path}: {entry['bytes']} bytes expected, {size} found")
            elif sha256_file(path) != entry["sha256"]:
                problems.append(f"{path}: SHA-256 differs from the manifest")
        except PermissionError:
            raise
        except OSError as error:
            problems.append(f"{path}: unreadable ({error.strerror})")
    return problems
