"""Addresses to tensors: the batches of a run in order, read ahead by one thread, and the fixed validation batches.

T is model.seq_len. A sample reads T + 1 tokens: inputs are the first T, targets the last T.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from tinylab.config.schema import RunConfig
from tinylab.data.order import DataOrder, Samples, check_ranks, data_hash, rank_slice
from tinylab.data.shards.reader import Shard, ShardSet, TokenStream
from tinylab.errors import DataError
from tinylab.model.loss import IGNORED, MicroBatch

_STEPS_AHEAD = 16
"""Steps whose shards are verified ahead of the one being read."""
_MOST_HASHING_THREADS = 8
"""Per rank; one core hashes about 1.2 GB/s, more than most disks deliver to one reader."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a step."""

    step: int
    micro_batches: list[MicroBatch]
    """Of parallel.micro_batch sequences each; the last one may hold fewer."""
    data_hash: int
    """Hash of this rank's samples; the ranks' values add up (mod 2^64) to the step's."""


class Loader:
    """The batches of steps `start_step` … end of the run, for one rank. Iterate over it once; close it when done.

    A background thread reads up to `prefetch` steps ahead; what it raises is raised from the iteration. Other threads
    compare the shards of coming steps with their SHA-256 (integrity.py): a batch waits for its own shards only.
    Raises ConfigError when `world` does not divide the sequences of every stage's step, DataError when data do not fit
    or a shard is damaged.
    """

    def __init__(
        self,
        config: RunConfig,
        shards: ShardSet,
        *,
        rank: int = 0,
        world: int = 1,
        start_step: int = 1,
        micro_batch: int | None = None,
        prefetch: int = 2,
    ) -> None:
        check_ranks(config, world)
        self.order = DataOrder.of(config, shards)
        self._config, self._rank, self._world = config, rank, world
        self._steps = range(start_step, config.steps + 1)
        self._micro_batch = micro_batch or config.parallel.micro_batch
        self._streams = [shards.stream("train", name) for name in self.order.names]
        self._announced: set[Shard] = set()
        workers = min(_MOST_HASHING_THREADS, os.cpu_count() or 1)
        self._hashing = ThreadPoolExecutor(workers, thread_name_prefix="tinylab-hashing")
        self._ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(maxsize=max(prefetch, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tinylab-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, StepBatch):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """End the threads and drop what was read ahead. Safe to call again."""
        self._stop.set()
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._ready.get_nowait()
            self._thread.join(timeout=0.01)
        self._hashing.shutdown(cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            coming = (self._announce(step) for step in self._steps)
            ahead = deque(islice(coming, _STEPS_AHEAD))
            for step in self._steps:
                self._put(self._read_step(step, ahead.popleft()))
                if self._stop.is_set():
                    return
                ahead.extend(islice(coming, 1))
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _announce(self, step: int) -> Samples:
        """This rank's samples of a step; the shards that no step before it needs are handed to the hashing threads."""
        samples = rank_slice(self.order.samples(step), self._rank, self._world)
        seq_len, index = self._config.model.seq_len, self._config.data.document_mask
        for i in np.unique(samples.source).tolist():
            starts = samples.window[samples.source == i] * seq_len
            for shard in self._streams[i].shards_of(starts, seq_len + 1):
                if shard not in self._announced:
                    self._announced.add(shard)
                    self._hashing.submit(shard.verify, index=index)  # what it raises, reading raises again
        return samples

    def _read_step(self, step: int, samples: Samples) -> StepBatch:
        batches = []
        for first in range(0, len(samples), self._micro_batch):
            part = samples[first : first + self._micro_batch]
            batches.append(_read(self._config, self._streams, part.source, part.window))
        return StepBatch(step, batches, data_hash(samples))

    def _put(self, item: StepBatch | BaseException | None) -> None:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return


def validation_windows(config: RunConfig, shards: ShardSet) -> list[tuple[str, int]]:
    """The (source, window) pairs that every validation reads: at most validation.sequences, always the same.

    Sources share the number evenly as far as they have windows; a source's windows are spread over its split.
    Raises DataError when the validation split holds no window at all.
    """
    seq_len = config.model.seq_len
    available = {n: shards.stream("validation", n).n_windows(seq_len) for n in config.data.source_names}
    left = min(config.validation.sequences, sum(available.values()))
    if not left:
        held = {n: shards.stream("validation", n).n_tokens for n in available}
        raise DataError(
            f"{shards.path}: the validation split must hold at least model.seq_len + 1 = {seq_len + 1} tokens of one "
            f"source; found {', '.join(f'{n}: {t}' for n, t in held.items())}. Give more text (a source's only "
            "document is never held out), raise data.validation_fraction, or shorten model.seq_len"
        )
    chosen: dict[str, list[int]] = {}
    by_size = sorted(available, key=lambda n: available[n])
    for i, name in enumerate(by_size):
        total = available[name]
        count = min(total, left // (len(by_size) - i))
        chosen[name] = [k * total // count for k in range(count)]
        left -= count
    return [(name, window) for name in available for window in chosen[name]]


def validation_batches(
    config: RunConfig, shards: ShardSet, micro_batch: int, rank: int = 0, world: int = 1
) -> Iterator[MicroBatch]:
    """One rank's part of the validation sequences; a rank may have none. Raises DataError as `validation_windows`."""
    pairs = validation_windows(config, shards)
    pairs = pairs[len(pairs) * rank // world : len(pairs) * (rank + 1) // world]
    names = config.data.source_names
    streams = [shards.stream("validation", n) for n in names]
    for first in range(0, len(pairs), micro_batch):
        part = pairs[first : first + micro_batch]
        source = np.array([names.index(n) for n, _ in part], dtype=np.int64)
        yield _read(config, streams, source, np.array([w for _, w in part], dtype=np.int64))


def _read(config: RunConfig, streams: list[TokenStream], source: np.ndarray, window: np.ndarray) -> MicroBatch:
    """The samples at the given windows of the given sources, as tensors."""
    seq_len, vocab_size = config.model.seq_len, config.model.vocab_size
    tokens = np.empty((len(window), seq_len + 1), dtype=np.int64)
    for i in np.unique(source).tolist():
        rows = np.flatnonzero(source == i)
        tokens[rows] = streams[i].read_many(window[rows] * seq_len, seq_len + 1)
    if tokens.max() >= vocab_size:
        row, column = np.argwhere(tokens >= vocab_size)[0].tolist()
        place = streams[source[row]].locate(int(window[row]) * seq_len + column)
        raise DataError(
            f"{place}: ids must be below {vocab_size}; found {tokens[row, column]}. The file changed after it was "
            "checked: restore it from a copy, or delete the data folder and prepare it again (tinylab prepare)"
        )
    inputs, targets = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())
    if not config.data.document_mask:
        return MicroBatch(inputs, targets, None)
    begins = np.zeros(tokens.shape, dtype=np.int32)
    for row in range(len(window)):
        begins[row, streams[source[row]].document_starts(int(window[row]) * seq_len, seq_len + 1)] = 1
    begins[:, 0] = 0
    targets[torch.from_numpy(begins[:, 1:] == 1)] = IGNORED
    document_ids = np.cumsum(begins[:, :-1], axis=1, dtype=np.int32)
    return MicroBatch(inputs, targets, torch.from_numpy(document_ids))
