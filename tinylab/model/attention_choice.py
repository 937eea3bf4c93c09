"""Which attention backend a run uses: the one it names, or the fastest of those that give the right result here."""

import statistics
import time
import warnings

import torch
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.config.schema import Parallel
from tinylab.errors import ConfigError
from tinylab.model.attention import BACKENDS, TORCH, Backend

ROUNDS = 9
"""Measured passes of each candidate, in turn; the median counts."""
_WARM_UP = 3
_TOKENS = 40
"""Length of a trial: no multiple of any kernel's block."""
_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference from the math kernel in fp32 that the number format explains, for values of order 1."""

Shape = tuple[int, int, int, int, int]
"""B, H, K, T, D."""


def why_not(
    name: str,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    n_head: int = 4,
    n_kv_head: int = 2,
    head_size: int = 64,
    documents: bool = False,
) -> str | None:
    """None where the backend's output and gradients equal the math kernel's on small inputs, else why it cannot run.

    A package that imports proves nothing, so a forward and a backward pass are tried.
    """
    tried = BACKENDS[name]
    if documents and tried.documents is None:
        return "it cannot keep documents apart"
    device = torch.device(device)
    try:
        shape = (2, n_head, n_kv_head, _TOKENS, head_size)
        ids = torch.arange(_TOKENS, device=device).div(13, rounding_mode="floor").expand(2, -1) if documents else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _pass(tried, *_inputs(shape, device, dtype), ids)
        wanted = _pass(BACKENDS["math"], *_inputs(shape, device, torch.float32), ids)
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:  # a capability is what runs: any failure is the reason
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
    pairs = zip(("output", "gradient of q", "gradient of k", "gradient of v"), found, wanted, strict=True)
    for what, ours, exact in pairs:
        error = (ours.float() - exact).abs().max().item()
        if not error < _ERROR[dtype] * max(1.0, exact.abs().max().item()):
            return f"its {what} differs from the math kernel's by {error:.3g}"
    return None


def choose_attention(
    model: Model, parallel: Parallel, device: torch.device, dtype: torch.dtype, *, documents: bool = False
) -> tuple[str, dict[str, float]]:
    """The backend of a run, and the median seconds of each candidate measured (empty where nothing was).

    A named backend is tried, and refused with the reason (ConfigError) if it cannot run. `auto` on CUDA measures
    forward and backward passes on the run's own shapes, in turn, over the fused backends that run; on a CPU torch has
    one fused kernel and picks it, so nothing is measured and two runs never differ. Where no fused backend runs,
    torch chooses.
    """
    heads = {"n_head": model.n_head, "n_kv_head": model.n_kv_head, "head_size": model.head_size, "documents": documents}
    if parallel.attention not in ("auto", TORCH.name):
        reason = why_not(parallel.attention, device, dtype, **heads)
        if reason is not None:
            live = [name for name in BACKENDS if why_not(name, device, dtype, **heads) is None]
            raise ConfigError(
                f'parallel.attention = "{parallel.attention}" must be able to run on {device} in {dtype} '
                f"{'with documents kept apart' if documents else 'with this model'}; found: {reason}. "
                f"These can: {', '.join(live)}"
            )
        return parallel.attention, {}
    if parallel.attention == TORCH.name or device.type != "cuda":
        return TORCH.name, {}
    names = ("flash-attn", "xformers", "efficient") + (("flex",) if documents else ("cudnn", "flash"))
    candidates = [name for name in names if why_not(name, device, dtype, **heads) is None]
    if len(candidates) < 2:
        return (candidates or [TORCH.name])[0], {}
    shape = (parallel.micro_batch, model.n_head, model.n_kv_head, model.seq_len, model.head_size)
    seconds = measure(candidates, shape, device, dtype, documents=documents)
    return min(seconds, key=seconds.__getitem__), seconds


def measure(
    names: list[str], shape: Shape, device: torch.device, dtype: torch.dtype, *, documents: bool
) -> dict[str, float]:
    """Median seconds of a forward and backward pass of each backend, taken in turn.

    With documents, each row holds eight of equal length.
    """
    inputs = _inputs(shape, device, dtype)
    B, T = shape[0], shape[3]
    ids = torch.arange(T, device=device).div(max(1, T // 8), rounding_mode="floor").expand(B, T) if documents else None
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(_WARM_UP + ROUNDS):
        for name in names:
            wait_for(device)
            start = time.perf_counter()
            _pass(BACKENDS[name], *inputs, ids)
            wait_for(device)
            if round_ >= _WARM_UP:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of order 1, the same values in every dtype up to its rounding."""
    B, H, K, T, D = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, T, D, generator=generator).to(device, dtype).requires_grad_() for n in (H, K, K))
    return q, k, v


def _pass(tried: Backend, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, ...]:
    """Output and gradients (of q, k, v) of one forward and backward pass."""
    prepared = tried.documents(documents) if documents is not None and tried.documents is not None else None
    out = tried.attend(q, k, v, documents=prepared)
    return out.detach(), *torch.autograd.grad(out.float().sin().sum(), (q, k, v))


def wait_for(device: torch.device) -> None:
    """Return when the device has done all work given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
