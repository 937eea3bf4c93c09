"""In which batches a model scores its requests: a context with several continuations runs once.

A row is (ids, count): the ids of a context with its continuation behind it, and the tokens of the continuation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Row = tuple[tuple[int, ...], int]
MIN_SHARED_TOKENS = 8
"""Contexts shorter than this run with each of their continuations: setting up a cache costs more than it saves."""


@dataclass(frozen=True)
class Batch:
    """Rows that one pass scores."""

    rows: list[Row]
    shared: int
    """Tokens of every row's context if each different context runs once for all its rows; 0: every row runs whole."""


def batches(rows: Iterable[Row], max_tokens: int) -> Iterator[Batch]:
    """Every row in one batch, the longest first, in an order that depends on the rows alone.

    Rows × tokens of the longest, which bounds the cache as well, stays within max_tokens (at least one row each).
    """
    by_context: dict[tuple[int, ...], list[Row]] = {}
    for ids, count in sorted(rows, key=lambda row: (-len(row[0]), row[0])):
        by_context.setdefault(ids[:-count], []).append((ids, count))
    groups, lone = [], []
    for context, group in by_context.items():
        worth = len(group) > 1 and len(context) >= MIN_SHARED_TOKENS and _size(group) <= max_tokens
        (groups if worth else lone).append(group)
    groups.sort(key=lambda group: -_context(group))  # keeps the order among equals: the longest row first
    for packed in _packed(groups, max_tokens, same_context=True):
        yield Batch(packed, _context(packed))
    ordered = sorted((row for group in lone for row in group), key=lambda row: (-len(row[0]), row[0]))
    for packed in _packed([[row] for row in ordered], max_tokens, same_context=False):
        yield Batch(packed, 0)


def _packed(groups: list[list[Row]], max_tokens: int, same_context: bool) -> Iterator[list[Row]]:
    """Neighbouring groups joined while they fit, and with `same_context` while their contexts are of one length."""
    batch: list[Row] = []
    for group in groups:
        if batch and (_size(batch + group) > max_tokens or (same_context and _context(batch) != _context(group))):
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch


def _size(rows: list[Row]) -> int:
    """Padded tokens of rows; the last token of a continuation is only predicted, never read."""
    return len(rows) * (max(len(ids) for ids, _ in rows) - 1)


def _context(rows: list[Row]) -> int:
    ids, count = rows[0]
    return len(ids) - count
