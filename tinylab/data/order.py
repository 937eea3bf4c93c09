"""The batch of step N as a pure function of (configuration, windows per source, N). No torch, no state.

    step → sample numbers n           stages laid end to end, each with its own batch size
    n → (source, number in source)    a binary tree over the sources that follows the mixture within 1.5 samples
                                      (half a sample per level of the tree: 1.5 for up to 8 sources, 2.5 for 32)
    number → (epoch, place)           division by the windows of the source
    place → window                    a keyed permutation of the source's windows, another one in every epoch

Window w of a source is tokens [w*T, w*T + T + 1) of its stream. Every part costs O(number of sources) at any step.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from tinylab.config.schema import RunConfig
from tinylab.config.stages import Stage
from tinylab.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tinylab.data.shards.reader import ShardSet

_UNIT = 2**40
"""Shares are integers over a denominator up to this, so that share * samples of a batch fits 64 bits."""
_CHUNK = 2**20
"""Samples placed at once at most, for the same reason."""
_MAX_PIECES = 4096
"""Pieces of constant shares that a ramp is cut into at most."""
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Samples:
    """Addresses of samples, one row each, as int64 arrays of equal length."""

    n: np.ndarray
    """Number of the sample in the run, from 0."""
    source: np.ndarray
    """Index of its source in `DataOrder.names`."""
    epoch: np.ndarray
    """How many times the source was used up before, from 0."""
    window: np.ndarray
    """Window of the source's stream."""

    def __len__(self) -> int:
        return len(self.n)

    def __getitem__(self, rows: slice) -> Samples:
        return Samples(self.n[rows], self.source[rows], self.epoch[rows], self.window[rows])


class DataOrder:
    """Which samples each step of a run consumes, over all ranks.

    `windows` is the number of windows in each source's training stream. Raises DataError naming every source that has a
    share in some stage and no window.
    """

    def __init__(self, config: RunConfig, windows: Mapping[str, int]) -> None:
        self.config = config
        self.names = config.data.source_names
        weights = [_integer_weights(stage, self.names) for stage in config.stages]
        empty = [n for i, n in enumerate(self.names) if any(w[i] for w in weights) and windows.get(n, 0) < 1]
        if empty:
            raise DataError(
                f"every source with a share must hold at least model.seq_len + 1 = {config.model.seq_len + 1} training "
                f"tokens; found fewer in: {', '.join(empty)}. Give more text, a shorter seq_len, or a share of 0"
            )
        self._windows = [windows.get(n, 0) for n in self.names]
        keys = (hashlib.sha256(f"tinylab order 1\0{config.seed}\0{n}".encode()).digest() for n in self.names)
        self._keys = [int.from_bytes(key[:8], "little") for key in keys]
        self._root = _Node(range(len(self.names)))
        self._starts: list[int] = []
        for start, shares in _pieces(config, weights):
            self._starts.append(start)
            self._root.begin_piece(start, shares)

    @classmethod
    def of(cls, config: RunConfig, shards: ShardSet) -> DataOrder:
        """The order of a run over prepared data. Raises DataError when vocabulary or sources do not fit."""
        if shards.vocab_size != config.model.vocab_size:
            raise DataError(
                f"{shards.path} must hold ids of the model's vocabulary, {config.model.vocab_size} entries "
                f"(model.vocab_size); found a tokenizer of {shards.vocab_size}. Set model.vocab_size and "
                "data.vocab_size to it, or prepare the data with another tokenizer"
            )
        seq_len = config.model.seq_len
        return cls(config, {n: shards.stream("train", n).n_windows(seq_len) for n in config.data.source_names})

    def samples(self, step: int) -> Samples:
        """The samples of step `step` (from 1), in order. Raises ConfigError outside the run."""
        stage = self.config.stages[self.config.stage_index(step)]
        seq_len = self.config.model.seq_len
        first = self.config.tokens_at(step - 1) // seq_len
        count = stage.batch_tokens // seq_len
        source, number = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            piece = bisect_right(self._starts, first + done) - 1
            border = self._starts[piece + 1] if piece + 1 < len(self._starts) else first + count
            length = min(count - done, border - first - done, _CHUNK)
            rows = np.arange(done, done + length)
            self._root.place(piece, first + done, rows - done, rows, source, number)
            done += length
        epoch, window = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for i, size in enumerate(self._windows):
            rows = np.flatnonzero(source == i)
            if len(rows):
                epoch[rows], place = np.divmod(number[rows], size)
                window[rows] = permute(
                    place, size, _mix(epoch[rows].astype(np.uint64) * _GOLDEN + np.uint64(self._keys[i]))
                )
        return Samples(np.arange(first, first + count, dtype=np.int64), source, epoch, window)


def check_ranks(config: RunConfig, world: int) -> None:
    """Raise ConfigError unless `world` ranks divide the sequences of a step in every stage."""
    for stage in config.stages:
        sequences = stage.batch_tokens // config.model.seq_len
        if sequences % world:
            near = {max(sequences // world, 1) * world, (sequences // world + 1) * world}
            valid = " or ".join(str(s * config.model.seq_len) for s in sorted(near))
            raise ConfigError(
                f"the number of ranks ({world}) must divide the sequences of a step ({sequences}) in stage "
                f"{stage.name}; nearest valid stages.{stage.name}.batch_tokens: {valid}, or use another number of ranks"
            )


def rank_slice(samples: Samples, rank: int, world: int) -> Samples:
    """The contiguous part of a step's samples that rank `rank` of `world` consumes (`check_ranks` holds)."""
    assert len(samples) % world == 0, f"{world} ranks do not divide {len(samples)} samples"
    share = len(samples) // world
    return samples[rank * share : (rank + 1) * share]


def data_hash(samples: Samples) -> int:
    """A 64-bit number for a set of samples: values of disjoint parts add up (mod 2^64) to the value of the union."""
    state = np.zeros(len(samples), dtype=np.uint64)
    for column in (samples.n, samples.source, samples.epoch, samples.window):
        state = _mix((state ^ column.astype(np.uint64)) + _GOLDEN)
    return int(state.sum(dtype=np.uint64))


def format_hash(value: int) -> str:
    """A hash, or a sum of hashes, as 16 hexadecimal digits."""
    return f"{value & _MASK:016x}"


def permute(place: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Places 0 … size-1 under a keyed permutation of them: int64 in, int64 out, one 64-bit key per place.

    A Feistel network over a grid of ceil(sqrt(size)) rows that just covers `size`; a value outside is
    permuted again (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    value = _feistel(place.astype(np.uint64), rows, columns, keys)
    while (outside := np.flatnonzero(value >= size)).size:
        value[outside] = _feistel(value[outside], rows, columns, keys[outside])
    return value.astype(np.int64)


def _feistel(value: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0 … rows*columns-1."""
    row, column = np.divmod(value, np.uint64(columns))
    for i in range(0, _ROUNDS, 2):
        row = (row + _mix(keys + (column * np.uint64(_ROUNDS) + np.uint64(i + 1)) * _GOLDEN)) % np.uint64(rows)
        column = (column + _mix(keys + (row * np.uint64(_ROUNDS) + np.uint64(i + 2)) * _GOLDEN)) % np.uint64(columns)
    return row * np.uint64(columns) + column


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): uint64 arrays, arithmetic mod 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _integer_weights(stage: Stage, names: Sequence[str]) -> list[int]:
    """A stage's shares as integers in the exact ratio of the decimal numbers that the configuration states."""
    given = stage.mixture or dict.fromkeys(names, 1.0)
    exact = [Fraction(repr(float(given.get(n, 0.0)))) for n in names]
    scale = math.lcm(*(f.denominator for f in exact))
    weights = [int(f * scale) for f in exact]
    divisor = math.gcd(*weights)
    return [w // divisor for w in weights]


def _pieces(config: RunConfig, weights: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Stretches of constant shares: (first sample, integer weights), in order.

    A ramp is cut into about sqrt(its samples) pieces, each with the shares at its middle, so that counts at the
    pieces' borders are those of the linear ramp, and between them within 1/8 sample (ramps up to 16M samples).
    """
    seq_len = config.model.seq_len
    result: list[tuple[int, list[int]]] = []
    start = 0
    for i, stage in enumerate(config.stages):
        samples = stage.steps * stage.batch_tokens // seq_len
        ramp = stage.ramp_tokens // seq_len if i and weights[i] != weights[i - 1] else 0
        if ramp:
            old, new = weights[i - 1], weights[i]
            count = min(ramp, math.isqrt(ramp) + 1, _MAX_PIECES)
            for low, high in pairwise(ramp * k // count for k in range(count + 1)):
                to = (low + high) * sum(old)
                back = (2 * ramp - low - high) * sum(new)
                result.append((start + low, [a * back + b * to for a, b in zip(old, new, strict=True)]))
        if ramp < samples:
            result.append((start + ramp, weights[i]))
        start += samples
    return result


@dataclass(frozen=True)
class _Split:
    """How a node splits its samples during one piece: P(m) = (sum + share * (m - begin)) / unit goes left."""

    begin: int
    unit: int
    share: int
    sum: int

    def at(self, m: int) -> int:
        """P(m) * unit."""
        return self.sum + self.share * (m - self.begin)


class _Node:
    """A group of sources. Sample m of the group goes to its left half when [P(m + 1)] > [P(m)].

    P is the running integral of the left half's share of the group; [x] rounds to the nearest, halves up. Its number
    is [P(m)] on the left, m - [P(m)] on the right. All are integers: nothing drifts, however long the run.
    """

    def __init__(self, sources: Sequence[int]) -> None:
        self.sources = sources
        half = (len(sources) + 1) // 2
        self.children = (_Node(sources[:half]), _Node(sources[half:])) if len(sources) > 1 else None
        self.splits: list[_Split] = []

    def begin_piece(self, begin: int, weights: Sequence[int]) -> None:
        """From the group's sample `begin` on, shares are as `weights` (of all sources)."""
        if self.children is None:
            return
        left, right = self.children
        low, total = (sum(weights[i] for i in node.sources) for node in (left, self))
        ratio = Fraction(low, total) if total else Fraction(0)
        old = self.splits[-1] if self.splits else None
        before = Fraction(old.at(begin), old.unit) if old else Fraction(0)
        exact = math.lcm(ratio.denominator, before.denominator)
        unit = exact * (_UNIT // exact // 2 * 2) if exact <= _UNIT // 2 else _UNIT
        # The sum is rounded down to an even unit, so [P] does not change: no number is skipped or used twice.
        split = _Split(begin, unit, round(ratio * unit), math.floor(before * unit))
        self.splits.append(split)
        to_left = (split.sum + unit // 2) // unit
        left.begin_piece(to_left, weights)
        right.begin_piece(begin - to_left, weights)

    def place(
        self, piece: int, base: int, offsets: np.ndarray, rows: np.ndarray, source: np.ndarray, number: np.ndarray
    ) -> None:
        """Write source and number-in-source of the group's samples base + offsets into the given `rows`."""
        if self.children is None:
            source[rows] = self.sources[0]
            number[rows] = base + offsets
            return
        split = self.splits[piece]
        before, rest = divmod(split.at(base) + split.unit // 2, split.unit)
        sums = rest + split.share * offsets
        here = sums // split.unit
        goes_left = (sums + split.share) // split.unit > here
        left, right = self.children
        left.place(piece, before, here[goes_left], rows[goes_left], source, number)
        right.place(piece, base - before, (offsets - here)[~goes_left], rows[~goes_left], source, number)
