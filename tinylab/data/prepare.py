"""Corpora to token shards, once: find them prepared, or build them (build.py) and commit them.

All files are written to a temporary folder beside the target, which one rename puts in place, manifest included;
after an interruption the same command starts anew.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tinylab.config.io import run_to_dict
from tinylab.config.schema import Data
from tinylab.data.build import Say, build
from tinylab.data.corpus.files import listing
from tinylab.data.shards.reader import ShardSet, open_shards
from tinylab.errors import CheckpointError, DataError
from tinylab.runs.durable import disk_error, failpoint
from tinylab.runs.folder import home
from tinylab.runs.manifest import MANIFEST, commit_folder, temporary_folder

_NOT_IN_SHARDS = ("path", "document_mask")


def data_path(data: Data) -> Path:
    """Folder of the shards of a data section: `data.path`, else TINYLAB_HOME/data/<digest of what decides them>."""
    if data.path:
        return Path(data.path).expanduser().absolute()
    text = json.dumps(_identity(data), sort_keys=True)
    return home() / "data" / hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare(data: Data, *, path: Path | None = None, progress: Say | None = None) -> ShardSet:
    """The shards of a data section in `path` (default: `data_path(data)`), prepared now if they are not there yet.

    Two callers at once: the second waits and finds them done. Shards do not change when the files of a source
    do, since a run must be able to continue; a line says so. `progress` receives lines of text (default: standard
    error). Raises DataError: a missing, empty or unreadable corpus (source and file named), a tokenizer of another
    size than data.vocab_size, other data in the folder, no permission, not enough disk. Then nothing is left behind.
    """
    target = (path or data_path(data)).absolute()
    say = progress or (lambda line: print(f"prepare: {line}", file=sys.stderr, flush=True))
    shards = _prepared(target, data)
    if shards is not None:
        _say_what_changed(shards, data, say)
        return shards
    with _locked(target, say):
        shards = _prepared(target, data)
        if shards is not None:
            return shards
        folder = target
        try:
            folder = temporary_folder(target)
            listings = _listings(data)
            manifest = {**build(folder, data, _identity(data), say), "listings": listings}
            shutil.rmtree(folder / "spool")
            failpoint("prepare.filled")
            if target.exists():
                target.rmdir()  # empty, see _prepared
            commit_folder(folder, target, extra=manifest)
        except CheckpointError as error:
            raise DataError(str(error)) from error
        except OSError as error:
            raise DataError(str(disk_error(folder, error))) from error
        finally:
            if folder != target:
                shutil.rmtree(folder, ignore_errors=True)
    return open_shards(target)


def _identity(data: Data) -> dict[str, Any]:
    return {k: v for k, v in run_to_dict(data).items() if k not in _NOT_IN_SHARDS}


def _prepared(target: Path, data: Data) -> ShardSet | None:
    """The shards in `target` if they are those of `data`; None if there is nothing yet.

    Raises DataError when the folder holds something else.
    """
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return None
    except OSError as error:
        raise DataError(str(disk_error(target, error))) from error
    if not (target / MANIFEST).exists():
        raise DataError(
            f"{target} must be empty or hold prepared data; found other files and no {MANIFEST}. "
            "Choose another folder (data.path)"
        )
    shards = open_shards(target)
    found, wanted = shards.manifest["config"], _identity(data)
    if found != wanted:
        keys = [k for k in {**wanted, **found} if found.get(k) != wanted.get(k)]
        differences = "; ".join(f"data.{k} is {found.get(k)!r} there, {wanted.get(k)!r} here" for k in sorted(keys))
        raise DataError(
            f"{target} must hold the data of this configuration; {differences}. "
            "Choose another folder (data.path), leave it out, or delete this one"
        )
    return shards


def _listings(data: Data) -> dict[str, dict[str, Any]]:
    """The local files behind each source and the tokenizer, as `listing` describes them."""
    places = {"tokenizer": data.tokenizer} if data.tokenizer != "train" else {}
    for source in data.sources:
        kind, _, rest = source.corpus.partition(":")
        if kind != "local":
            places[f"source {source.name}"] = rest.partition(":")[0] if kind == "hf" else rest
    return {f"{what} ({place})": found for what, place in places.items() if (found := listing(place))}


def _say_what_changed(shards: ShardSet, data: Data, say: Say) -> None:
    """Say which files have changed since `shards` were prepared; files that are gone do not count."""
    now = _listings(data)
    for what, before in shards.manifest.get("listings", {}).items():
        if now.get(what, before) != before:
            say(
                f"{shards.path} is used as it was prepared, but {what} has changed: {before['files']:,} files then, "
                f"{now[what]['files']:,} now, with other names or sizes. "
                "To prepare it again, delete the folder or choose another (data.path)"
            )


@contextmanager
def _locked(target: Path, say: Say) -> Iterator[None]:
    """Hold the lock of `target`, a file beside it that its holder removes; waits for another preparation."""
    path = target.with_name(f".lock-{target.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process prepares {target}; waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            os.close(descriptor)  # its holder has ended and removed the file: compete for the next one
    except OSError as error:
        raise DataError(str(disk_error(path, error))) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
