"""Is a folder of prepared data as it was written?

At the start: the manifest's own digest, and the presence and size of every file. At the first read of a shard: its
SHA-256. On demand (`tinylab verify`): every file, and nothing beside them.
"""

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tinylab.data.shards.format import DTYPES, START, VERSION, fingerprint_of
from tinylab.errors import DataError
from tinylab.runs.manifest import MANIFEST, Progress, compare_file, damaged_files

_RACY_NS = 1_000_000_000
_intact: set[tuple[str | int, ...]] = set()
"""Files that this process has found intact: path, inode, size, mtime and ctime (ns), SHA-256."""


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a data folder, with its own digest, names and counts checked."""
    file = path / MANIFEST
    remedy = "prepare the data again (tinylab prepare)"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} must hold prepared data ({MANIFEST}); found none: {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} must be a readable manifest; found: {error}. Delete the folder and {remedy}"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION or "splits" not in manifest:
        raise DataError(f"{file} must be a data manifest of version {VERSION}; found another file: {remedy}")
    if manifest.get("fingerprint") != fingerprint_of(manifest):
        raise DataError(f"{file}: the fingerprint must belong to its content; found it altered. Restore it or {remedy}")
    wrong = [
        f"{split}/{name}"
        for split, sources in manifest["splits"].items()
        for name, entry in sources.items()
        if not _is_consistent(entry, manifest["tokenizer"]["vocab_size"])
    ]
    if wrong:
        raise DataError(
            f"{file}: sizes, counts and ids of shards must fit together; found otherwise in {', '.join(wrong)}"
        )
    files = manifest.get("files", {})
    agree = all(files.get(e["file"]) == {"bytes": e["bytes"], "sha256": e["sha256"]} for e in _shard_files(manifest))
    if not agree or any(set(e) != {"bytes", "sha256"} for e in files.values()):
        raise DataError(f"{file}: files must agree with the shards' records; {remedy}")
    return manifest


def _is_consistent(entry: Mapping[str, Any], vocab_size: int) -> bool:
    """Whether a source's counts are the sums of its shards', and each shard's sizes follow from its counts."""
    records = entry["shards"]
    return all(entry[what] == sum(r[what] for r in records) for what in ("tokens", "documents")) and all(
        r["bytes"] == r["tokens"] * DTYPES[r["dtype"]].itemsize
        and r["index"]["bytes"] == r["documents"] * START.itemsize
        and r["max_id"] < vocab_size
        for r in records
    )


def _shard_files(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """`file`, `bytes` and `sha256` of every file of every shard."""
    for sources in manifest["splits"].values():
        for entry in sources.values():
            for record in entry["shards"]:
                yield from (record, record["index"], record["origins"])


def require_complete(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise DataError naming every file that is missing or of another size, and every damaged one of the tokenizer.

    What it costs does not depend on the size of the shards: their content is compared when it is first read.
    """
    in_shards = {entry["file"] for entry in _shard_files(manifest)}
    files = sorted(manifest["files"].items())
    with ThreadPoolExecutor(max_workers=16) as pool:  # waiting for a file server, not for a core
        found = pool.map(lambda f: _problem(path / f[0], f[1], content=f[0] not in in_shards), files)
        problems = [f"{path / name}: {problem}" for (name, _), problem in zip(files, found, strict=True) if problem]
    if problems:
        raise _damaged(path, problems)


def require_intact(root: Path, entry: Mapping[str, Any]) -> None:
    """Raise DataError unless the file `entry["file"]` of the data folder `root` has the size and SHA-256 of `entry`."""
    path = root / entry["file"]
    if problem := _problem(path, entry, content=True):
        raise _damaged(root, [f"{path}: {problem}"])


def _problem(path: Path, entry: Mapping[str, Any], *, content: bool) -> str | None:
    """How a file differs from the size and, with `content`, the SHA-256 of `entry`; None if it does not.

    A file is hashed once per process as long as its size and times stay the same.
    Raises DataError for a file that cannot be read: nothing is known about its content.
    """
    try:
        stat = path.stat()
        if stat.st_size != entry["bytes"] or not content:
            return None if stat.st_size == entry["bytes"] else f"{entry['bytes']} bytes expected, {stat.st_size} found"
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        known = (str(path), stat.st_ino, stat.st_size, *times, entry["sha256"])
        problem = None if known in _intact else compare_file(path, entry)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        raise DataError(
            f"{path} must be readable; found: {error.strerror}. Check its permissions and the disk"
        ) from error
    # A file younger than the clock's grain could change again and keep its times: not remembered.
    if problem is None and time.time_ns() - max(times) > _RACY_NS:
        _intact.add(known)
    return problem


def verify_shards(path: Path, *, progress: Progress | None = None) -> list[str]:
    """Every difference between a data folder and its manifest, one line each; all files are hashed, in parallel.

    Raises DataError when the manifest itself cannot be used, PermissionError for what may not be read.
    """
    manifest = read_manifest(path)
    # An empty split may have its folder.
    folders = {f"{split}/{name}" for split, sources in manifest["splits"].items() for name in sources}
    return damaged_files(path, manifest["files"], folders=folders, progress=progress)


def _damaged(path: Path, problems: list[str]) -> DataError:
    return DataError(
        f"{path} must be as it was prepared; found {len(problems)} damaged file{'s' * (len(problems) > 1)}: "
        + "; ".join(problems)
        + ". Restore from a copy, or delete the folder and prepare it again (tinylab prepare)"
    )
