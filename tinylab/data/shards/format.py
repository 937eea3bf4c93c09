"""What prepared data look like on disk.

    DATA/manifest.json              what was prepared, from what, with which tokenizer; digests of files; fingerprint
    DATA/tokenizer/                 a Hugging Face tokenizer folder
    DATA/SPLIT/SOURCE/00000.bin     ids, uint16 (vocabularies up to 65,536) or uint32, little endian
    DATA/SPLIT/SOURCE/00000.idx     start of each document in the shard, int64 little endian
    DATA/SPLIT/SOURCE/00000.docs.jsonl   per document: origin, bytes and sha256 of its text, tokens

A source's stream is the concatenation of its shards. No padding is stored; documents never cross a shard, samples may.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

VERSION = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 2**26
"""Tokens of a full shard: 128 MiB as uint16."""
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
START = np.dtype("<i8")
_NOT_IDENTITY = ("fingerprint", "files", "listings")
"""Keys of a manifest that may differ for the same texts: `listings` describes files, which may be compressed anew."""


def dtype_name(vocab_size: int) -> str:
    """The smallest stored type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over a data manifest without the keys of `_NOT_IDENTITY`: the identity of the prepared data."""
    rest = {k: v for k, v in manifest.items() if k not in _NOT_IDENTITY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def build_manifest(
    config: dict[str, Any],
    tokenizer: dict[str, Any],
    splits: dict[str, dict[str, dict[str, Any]]],
    *,
    seed: int,
    tool: str,
    report: dict[str, Any],
) -> dict[str, Any]:
    """The data manifest with its fingerprint; `commit_folder(temporary, target, extra=…)` adds `files` and writes it.

    `splits[split][source]` is a `source_entry`. Nothing in it may depend on time or machine, since it is hashed.
    """
    content = {"config": config, "tokenizer": tokenizer, "seed": seed, "tool": tool, "splits": splits, "report": report}
    manifest = {"version": VERSION, **content}
    return {**manifest, "fingerprint": fingerprint_of(manifest)}


def source_entry(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A source's entry in one split: tokens, documents, UTF-8 bytes of text, and the records of `ShardWriter.close`."""
    return {
        "tokens": sum(r["tokens"] for r in records),
        "documents": sum(r["documents"] for r in records),
        "bytes": sum(r["text_bytes"] for r in records),
        "shards": list(records),
    }
