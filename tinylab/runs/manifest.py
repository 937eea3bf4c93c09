"""SHA-256 manifests and the commit protocol: a folder appears complete, or not at all.

Committed means: files fsynced, `manifest.json` written and fsynced, folder renamed from a temporary name,
parent fsynced, and only then the journal line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from tinylab.errors import CheckpointError
from tinylab.runs.durable import disk_error, failpoint, fsync_path, process_exists, write_atomic
from tinylab.runs.regular import open_regular, read_json

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symbolic link"}

Progress = Callable[[int, int], None]
"""Called with the bytes compared so far and the bytes to compare."""


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(open_regular(path, follow=True), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_path(target: Path) -> Path:
    """A path beside `target` that no other process takes: it names this host, this process and a random number."""
    owner = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    return target.with_name(f"{TEMPORARY_PREFIX}{target.name}.{owner}")


def temporary_folder(target: Path) -> Path:
    """A new, empty folder beside `target` to fill before `commit_folder`; what a kill left for `target` is removed.

    Raises CheckpointError if it cannot be made.
    """
    for left in leftovers(target.parent, target.name):
        shutil.rmtree(left, ignore_errors=True)
    folder = temporary_path(target)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    return folder


def leftovers(parent: Path, name: str | None = None) -> list[Path]:
    """Temporary folders in `parent` (for the target `name` alone, if given) whose process is provably gone.

    It ran on this host, and its number is free or has passed to this process. What another host made stays.
    """
    target = ".+" if name is None else re.escape(name)
    pattern = rf"{re.escape(TEMPORARY_PREFIX)}{target}\.{re.escape(socket.gethostname())}\.(\d+)\.[0-9a-f]{{8}}"
    found = [(p, re.fullmatch(pattern, p.name)) for p in parent.glob(f"{TEMPORARY_PREFIX}*")]
    owners = [(path, int(match[1])) for path, match in found if match]
    return sorted(path for path, pid in owners if pid == os.getpid() or not process_exists(pid))


def commit_folder(temporary: Path, target: Path, extra: dict[str, Any] | None = None) -> None:
    """Fsync every file, write the manifest last, and rename `temporary` to `target`, which must not exist.

    The manifest holds the keys of `extra` beside `files`.
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
        manifest = read_json(path, follow=True)  # a link is reported as such, beside all other problems
    except FileNotFoundError:
        raise CheckpointError(f"{path} must exist in a committed folder; found none: the save never ended") from None
    except PermissionError:
        raise  # no damage: nothing is known about the content
    except OSError as error:
        raise CheckpointError(f"{path} must be a readable manifest; found: {error}") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("bytes"), int) and isinstance(e.get("sha256"), str)
        for e in files.values()
    ):
        raise CheckpointError(f"{path} must hold bytes and sha256 of each file under `files`; found otherwise")
    return files


def verify_folder(folder: Path, *, progress: Progress | None = None) -> list[str]:
    """Every difference between `folder` and its manifest, as `damaged_files` lists them.

    Raises CheckpointError when there is no readable manifest, PermissionError for what may not be read.
    """
    return damaged_files(folder, read_manifest(folder), progress=progress)


def damaged_files(
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    *,
    folders: Collection[str] = (),
    progress: Progress | None = None,
) -> list[str]:
    """Every difference between `folder` and the `bytes` and `sha256` of its `files`, one line each, sorted by name.

    Differences are: a file that is missing, unlisted, unreadable, or of another size or content; a directory that
    holds no listed file and is not one of `folders`; a symbolic link or special file, even one to the same bytes.
    Threads hash in parallel. Raises PermissionError for what may not be read: nothing is known about its content.
    """
    problems: dict[str, str] = {}
    kinds = _kinds_of_entries(folder, problems)
    directories = {str(p) for name in (*files, *folders) for p in PurePosixPath(name).parents} | set(folders)
    for name in (kinds.keys() | files.keys()) - problems.keys():
        kind, wanted = kinds.get(name), "file" if name in files or name == MANIFEST else None
        wanted = "directory" if name in directories else wanted
        if kind is None:
            problems[name] = "missing"
        elif wanted is None:
            empty = kind == "directory" and not any(other.startswith(f"{name}/") for other in kinds)
            problems[name] = f"{'empty ' * empty}{kind} that the manifest does not list"
        elif kind != wanted:
            problems[name] = f"{kind} in place of a {wanted}"
    sound = sorted(files.keys() - problems.keys())
    done, total = 0, sum(files[name]["bytes"] for name in sound)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        compared = pool.map(lambda name: compare_file(folder / name, files[name]), sound)
        for name, problem in zip(sound, compared, strict=True):
            if problem:
                problems[name] = problem
            done += files[name]["bytes"]
            if progress:
                progress(done, total)
    return [f"{folder / name}: {problem}" for name, problem in sorted(problems.items())]


def compare_file(path: Path, entry: Mapping[str, Any]) -> str | None:
    """How the file at `path` differs from the size and SHA-256 of `entry`; None if it does not.

    Raises PermissionError if it may not be read.
    """
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{entry['bytes']} bytes expected, {size} found"
        return None if sha256_file(path) == entry["sha256"] else "SHA-256 differs from the manifest"
    except FileNotFoundError:
        return "missing"
    except PermissionError:
        raise
    except OSError as error:
        return f"unreadable ({error.strerror})"


def _kinds_of_entries(folder: Path, problems: dict[str, str]) -> dict[str, str]:
    """The kind of everything below `folder`, by relative name; a directory that cannot be read goes to `problems`."""

    def failed(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise error
        problems[Path(error.filename).relative_to(folder).as_posix()] = f"unreadable ({error.strerror})"

    kinds = {}
    for at, folders, names in os.walk(folder, onerror=failed):
        for name in (*folders, *names):
            path = Path(at, name)
            mode = stat.S_IFMT(path.lstat().st_mode)
            kinds[path.relative_to(folder).as_posix()] = _KINDS.get(mode, "special file")
    return kinds
