"""Runs of sequences of 4 tokens, given in samples instead of tokens, and what their order lists."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from tinylab.config.architecture import Model
from tinylab.config.schema import Data, RunConfig, Source
from tinylab.config.stages import Schedule, Stage
from tinylab.data.order import DataOrder

SEQ = 4


def toy(stages: list[Stage], n_sources: int = 2, seed: int = 7) -> RunConfig:
    """A run of sequences of 4 tokens over sources a, b, c …"""
    sources = tuple(Source(name=chr(97 + i), corpus="local:prose") for i in range(n_sources))
    return RunConfig(
        seed=seed,
        model=Model(vocab_size=100, n_layer=1, d_model=8, n_head=2, n_kv_head=1, d_ff=8, seq_len=SEQ),
        data=Data(sources=sources, vocab_size=100),
        stages=tuple(stages),
        schedule=Schedule(kind="constant", warmup_tokens=0),
    )


def stage(samples: int, batch: int, mixture: dict[str, float], name: str = "s", ramp: int = 0) -> Stage:
    """A stage given in samples instead of tokens."""
    return Stage(name=name, tokens=samples * SEQ, batch_tokens=batch * SEQ, mixture=mixture, ramp_tokens=ramp * SEQ)


def consumed(order: DataOrder, step: int) -> dict[str, int]:
    """Samples of each source in the steps up to `step`, from the tree's integrals: no sample is listed."""
    counts = {}

    def count(node: Any, m: int) -> None:
        if node.children is None:
            counts[order.names[node.sources[0]]] = m
            return
        split = node.splits[piece]
        to_left = (split.at(m) + split.unit // 2) // split.unit
        count(node.children[0], to_left)
        count(node.children[1], m - to_left)

    n = order.config.tokens_at(step) // order.config.model.seq_len
    piece = bisect_right(order._starts, n) - 1
    count(order._root, n)
    return counts


def all_samples(order: DataOrder) -> list[tuple[int, int, int, int]]:
    """(n, source, epoch, window) of every sample of the run."""
    rows = []
    for step in range(1, order.config.steps + 1):
        s = order.samples(step)
        rows += zip(s.n.tolist(), s.source.tolist(), s.epoch.tolist(), s.window.tolist(), strict=True)
    return rows
