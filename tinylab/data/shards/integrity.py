"""Is a folder of prepared data as it was written? Its manifest, and the digest of every file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tinylab.data.shards.writer import DTYPES, START, VERSION, fingerprint_of
from tinylab.errors import DataError
from tinylab.runs.manifest import MANIFEST, sha256_file

_RACY_NS = 1_000_000_000
_checked: dict[tuple[str, int, int, int, int], str] = {}
"""SHA-256 of files hashed by this process, by path, inode, size, mtime and ctime (ns)."""


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


def damaged_files(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files in the folder `path`, one line each; empty when all are as the manifest says.

    A file's digest is computed once per process as long as its size and times stay; threads hash in parallel.
    """
    expected = _expected_files(path, manifest)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda item: _problem(path / item[0], *item[1]), sorted(expected.items()))
        return [problem for problem in found if problem]


def _expected_files(path: Path, manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of every file of the folder, by relative name; the shards' records must agree."""
    files = manifest.get("files", {})
    records = [r for split in manifest["splits"].values() for source in split.values() for r in source["shards"]]
    entries = [e for r in records for e in (r, r["index"], r["origins"])]
    agree = all(files.get(e["file"]) == {"bytes": e["bytes"], "sha256": e["sha256"]} for e in entries)
    if not agree or any(set(e) != {"bytes", "sha256"} for e in files.values()):
        raise DataError(f"{path / MANIFEST}: files must agree with the shards' records; prepare the data again")
    return {name: (e["bytes"], e["sha256"]) for name, e in files.items()}


def _problem(path: Path, size: int, sha256: str) -> str | None:
    """What is wrong with a file, or None."""
    try:
        stat = path.stat()
        if stat.st_size != size:
            return f"{path}: {size} bytes expected, {stat.st_size} found"
        key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        digest = _checked.get(key) or sha256_file(path)
        # A file younger than the clock's grain could change again without a new time: not remembered.
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _RACY_NS:
            _checked[key] = digest
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: unreadable ({error.strerror})"
    return None if digest == sha256 else f"{path}: SHA-256 differs from the manifest"
