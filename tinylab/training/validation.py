"""The loss on held-out documents: nats per token, and bits per byte of their text."""

from __future__ import annotations

import math
import time
from functools import cached_property

import torch

from tinylab.config.schema import RunConfig
from tinylab.data.loader import validation_batches, validation_windows
from tinylab.data.shards.reader import ShardSet
from tinylab.data.tokenizer.load import load_tokenizer_file
from tinylab.dist.context import Context
from tinylab.dist.parallel import reshard
from tinylab.errors import TinylabError
from tinylab.model.loss import IGNORED, MicroBatch, token_losses
from tinylab.model.precision import Precision
from tinylab.model.transformer import Llama


def validates_at(config: RunConfig, step: int) -> bool:
    """Whether the run measures after `step`: the first, the last, and each that crosses validation.every_tokens."""
    every = config.validation.every_tokens
    crossed = config.tokens_at(step) // every > config.tokens_at(step - 1) // every
    return crossed or step in (1, config.steps)


class Validator:
    """Measures the same validation samples again and again: the first `validation.sequences` of the split."""

    def __init__(self, config: RunConfig, shards: ShardSet, context: Context, precision: Precision) -> None:
        self._config, self._shards, self._context = config, shards, context
        self._precision = precision

    def after(self, model: Llama, step: int) -> dict[str, float]:
        """`validation_loss`, `bits_per_byte` and the seconds it took if the run measures after `step`, else nothing.

        Every rank must call it. Raises TinylabError naming the step when the loss is not finite.
        """
        if not validates_at(self._config, step):
            return {}
        began = time.perf_counter()
        measured = self.measure(model)
        if not all(map(math.isfinite, measured.values())):
            raise TinylabError(
                f"the validation loss after step {step} must be finite; found {measured['validation_loss']}. "
                "Lower optimizer.lr or set optimizer.clip_norm in a new run"
            )
        return measured and measured | {"validation_s": round(time.perf_counter() - began, 6)}

    @torch.no_grad()
    def measure(self, model: Llama) -> dict[str, float]:
        """`validation_loss` (nats per token) and `bits_per_byte` over all ranks; empty without a validation sample.

        bits per byte = nats of the targets that stand for text / (ln 2 · bytes of that text): special tokens stand
        for none. Each rank measures its share of the sequences. Sums are in fp64, of a table with a column for each
        sequence, so that their order does not depend on the number of ranks.
        """
        context = self._context
        total = len(validation_windows(self._config, self._shards))
        column, end = (total * (context.rank + i) // context.world for i in (0, 1))
        table = torch.zeros(4, total, dtype=torch.float64, device=context.device)
        for batch in self._batches:
            batch = batch.to(context.device)
            with self._precision.step():
                losses = token_losses(model, batch.inputs, batch.targets, batch.document_ids).double()
            if column == end:
                continue  # it only filled up
            counted = batch.targets != IGNORED
            sizes = torch.where(counted, self._token_bytes[batch.targets.clamp(min=0)], 0)
            parts = [losses, counted, torch.where(sizes > 0, losses, 0.0), sizes]
            table[:, column : column + len(losses)] = torch.stack([p.sum(1, dtype=torch.float64) for p in parts])
            column += len(losses)
        reshard(model)
        nats, targets, text_nats, text_bytes = context.sum_tensor(table).sum(1).tolist()
        if not targets:
            return {}
        result = {"validation_loss": nats / targets}
        return result | ({"bits_per_byte": text_nats / (math.log(2) * text_bytes)} if text_bytes else {})

    @cached_property
    def _token_bytes(self) -> torch.Tensor:
        """Bytes of text that each id stands for (V,)."""
        tokenizer = load_tokenizer_file(self._shards.tokenizer_path)
        return torch.from_numpy(tokenizer.token_bytes()).to(self._context.device)

    @cached_property
    def _batches(self) -> list[MicroBatch]:
        """This rank's share of the samples."""
        rank, world = self._context.rank, self._context.world
        parallel = self._config.parallel
        size = 1 if parallel.reduction == "canonical" else parallel.micro_batch
        own = list(validation_batches(self._config, self._shards, size, rank, world))
        return own + _fill_up(self._config, len(own), self._context)


def _fill_up(config: RunConfig, own: int, context: Context) -> list[MicroBatch]:
    """Batches without a target, so that every rank does as many forward passes: sharded ones wait for each other."""
    counts = context.sum_integers([own * (rank == context.rank) for rank in range(context.world)])
    inputs = torch.zeros(1, config.model.seq_len, dtype=torch.int64)
    empty = MicroBatch(inputs=inputs, targets=torch.full_like(inputs, IGNORED), document_ids=None)
    return [empty] * (max(counts) - own)
