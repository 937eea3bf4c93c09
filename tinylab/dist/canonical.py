"""Sums that have the same bits in any order: `parallel.reduction = "canonical"`.

Sums of floats depend on their order, and so on the number of ranks. Canonical mode leaves nothing to order:

- each forward and backward pass has exactly one sequence, so its bits depend on nothing but the sequence and weights;
- its gradient is rounded to a multiple of 2^-50 and added as an integer. Integers add up to the same bits in any order
  and on any number of ranks, and are made floats again once, when the whole batch is in;
- what is left is done element by element, or on whole tensors (the norm), hence equally on slices of any size.

Every gradient is a share of the mean over the batch, so the rounding of n shares moves an element by n · 2^-51 at most:
5e-13 for 1,024 sequences, against Adam's eps of 1e-8. A share larger than 4096 / n is counted as not finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from tinylab.config.schema import Parallel
from tinylab.dist.context import Context
from tinylab.dist.parallel import sharded_modules, strategy_of, whole_tensor

_UNIT = 2.0**50
"""A sum's steps per 1.0; a power of two, so that scaling an fp32 value does not round it."""
_LARGEST = 2.0**12
"""What the absolute values of all shares may add up to: `_LARGEST` · `_UNIT` is within the range of int64."""


class FixedPointSum:
    """The sum of tensors of one shape, equal in every bit for any order of `add`."""

    def __init__(self, shares: int, shape: Sequence[int], device: torch.device) -> None:
        """`shares`: how many tensors all ranks add together."""
        self._limit = _LARGEST / shares
        self.units = torch.zeros(tuple(shape), dtype=torch.int64, device=device)
        """The sum so far, in 2^-50."""
        self.unusable = torch.zeros((), dtype=torch.int64, device=device)
        """How many shares held something that is not finite or too large; the sum then means nothing."""

    def add(self, values: Tensor) -> None:
        """Add fp32 values."""
        if values.numel():
            self.unusable += ~(values.abs().max() <= self._limit)  # false for NaN
        self.units += (values * _UNIT).round_().to(torch.int64)

    def total(self) -> Tensor:
        """The sum in fp32, rounded once."""
        return (self.units.double() / _UNIT).float()


class CanonicalGradients:
    """The gradients of one step, sequence by sequence: `add` after each backward pass, `finish` after the last one."""

    def __init__(self, model: nn.Module, parallel: Parallel, context: Context, sequences: int) -> None:
        """`sequences`: of this rank; every rank has as many."""
        self._context, self._left = context, sequences
        self._parameters = list(model.parameters())
        shares = sequences * context.world
        self._exchanged = strategy_of(parallel, context) == "ddp"
        self._scatters = [_CanonicalReduceScatter(module, shares) for module in sharded_modules(model)]
        """Of a sharded model; otherwise there is a sum for each parameter."""
        whole = [] if self._scatters else self._parameters
        self._sums = [(weight, FixedPointSum(shares, weight.shape, weight.device)) for weight in whole]

    def begin(self) -> None:
        """Before the forward pass of the next sequence."""
        self._left -= 1
        for scatter in self._scatters:
            scatter.last = self._left == 0

    def add(self) -> None:
        """Take up what the backward pass left in the parameters."""
        for weight, total in self._sums:
            if weight.grad is not None:
                total.add(weight.grad)
                weight.grad = None

    def finish(self) -> tuple[Tensor, Tensor]:
        """Put the sums over all ranks into `.grad`; their norm, and how many shares were unusable on this rank."""
        if self._exchanged:
            works = [distributed.all_reduce(total.units, async_op=True) for _, total in self._sums]
            for work in works:
                assert work is not None
                work.wait()
        for weight, total in self._sums:
            weight.grad = total.total()
        totals = [total for _, total in self._sums] + [s.total for s in self._scatters if s.total is not None]
        unusable = torch.stack([total.unusable for total in totals]).sum()
        # The norm of each whole tensor: a norm of slices would depend on their number.
        norms = [torch.linalg.vector_norm(whole_tensor(w.grad)) for w in self._parameters if w.grad is not None]
        return torch.linalg.vector_norm(torch.stack(norms)), unusable


class _CanonicalReduceScatter:
    """FSDP2's exchange of one module's gradients, as `FSDPModule.set_custom_reduce_scatter` takes it.

    It keeps each sequence's gradient in a sum of its own and hands FSDP2 zeros; with the last one come the ranks' sum
    and this rank's slice of it. So FSDP2's own additions are of zeros, and nothing is exchanged before the last one.
    """

    def __init__(self, module: nn.Module, shares: int) -> None:
        self._shares = shares
        self.total: FixedPointSum | None = None
        self.last = False
        self._replicas: distributed.ProcessGroup | None = None
        mesh = next(module.parameters()).device_mesh  # type: ignore[attr-defined]
        if mesh.ndim == 2:
            self._replicas = mesh.get_group("replicate")
            # FSDP2 then adds up the replicas without dividing: only the first one has more than zeros.
            module.set_gradient_divide_factor(float(mesh.size(1)))  # type: ignore[operator]
        module.set_custom_reduce_scatter(self)  # type: ignore[operator]

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: distributed.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        if self.total is None:
            self.total = FixedPointSum(self._shares, input_tensor.shape, input_tensor.device)
        self.total.add(input_tensor)
        output_tensor.zero_()
        if not self.last:
            return
        own = torch.empty(output_tensor.shape, dtype=torch.int64, device=output_tensor.device)
        scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor  # torch 2.11
        scatter(own, self.total.units, group=group)
        if self._replicas is not None:
            distributed.all_reduce(own, group=self._replicas)
            if distributed.get_rank(self._replicas) > 0:
                return
        self.total.units = own
        output_tensor.copy_(self.total.total())


def use_plain_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer compute every element alike. Fused AdamW treats the last few of a CPU tensor in another way,
    and which ones are last depends on how many ranks share it."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = False
