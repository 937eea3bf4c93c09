"""The batches in which a model scores its requests: a context with several continuations runs once.

A row is (ids, count): the ids of a context followed by a continuation, and how many of them the continuation has.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Row = tuple[tuple[int, ...], int]
MIN_SHARED_TOKENS = 8
"""Shorter contexts run again with each continuation: setting up a cache would cost more than it saves."""


@dataclass(frozen=True)
class Batch:
    """Rows that one pass scores."""

    rows: list[Row]
    shared: int
    """Tokens of every row's context if each distinct context runs once for all its rows; 0 if each row runs its own."""


def batches(rows: Iterable[Row], max_tokens: int) -> Iterator[Batch]:
    """Each row in exactly one batch, longest first, in an order that depends only on the rows.

    A batch's rows × tokens of its longest row, which also bounds the cache, is at most max_tokens unless it is one row.
    """
    by_context: dict[tuple[int, ...], list[Row]] = {}
    for ids, count in sorted(rows, key=lambda row: (-len(row[0]), row[0])):
        by_context.setdefault(ids[:-count], []).append((ids, count))
    groups, lone = [], []
    for context, group in by_context.items():
        worth = len(group) > 1 and len(context) >= MIN_SHARED_TOKENS and _size(group) <= max_tokens
        (groups if worth else lone).append(group)
    groups.sort(key=lambda group: -_context(group))  # stable: among equals the longest row first
    for packed in _packed(groups, max_tokens, same_context=True):
        yield Batch(packed, _context(packed))
    ordered = sorted((row for group in lone for row in group), key=lambda row: (-len(row[0]), row[0]))
    for packed in _packed([[row] for row in ordered], max_tokens, same_context=False):
        yield Batch(packed, 0)


def _packed(groups: list[list[Row]], max_tokens: int, same_context: bool) -> Iterator[list[Row]]:
    """Consecutive groups joined while they fit and, with `same_context`, while their contexts have one length."""
    batch: list[Row] = []
    for group in groups:
        if batch and (_size(batch + group) > max_tokens or (same_context and _context(batch) != _context(group))):
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch


def _size(rows: list[Row]) -> int:
    """Padded tokens of the rows; the last token of a continuation is predicted but never read."""
    return len(rows) * (max(len(ids) for ids, _ in rows) - 1)


def _context(rows: list[Row]) -> int:
    ids, count = rows[0]
    return len(ids) - count
