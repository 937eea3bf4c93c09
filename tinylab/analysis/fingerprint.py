"""What identifies one checkpoint: a SHA-256 per tensor, norms, non-finite values, a small sample of every matrix."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.formats.identity import hash_tensors
from tinylab.formats.load import open_weights
from tinylab.runs.manifest import sha256_file

SAMPLE = 2**20
"""Values kept of one checkpoint, 4 MB: 154 checkpoints of a series fit into memory together."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Fingerprint:
    """One checkpoint, read once from end to end, one tensor at a time."""

    model: Model
    dtype: str
    tokenizer: str | None
    """SHA-256 of tokenizer.json, or of tokenizer.model; None where neither is beside the weights."""
    hashes: dict[str, str]
    """Hash of each tensor by itself (formats/identity.py)."""
    hash: str
    """The weight hash: that of a score's key and of a live model (formats/identity.py)."""
    norm: float
    """Euclidean norm of all weights."""
    nan: int
    infinite: int
    zero: tuple[str, ...]
    """Matrices in which every value is 0."""
    sample: np.ndarray
    """The same values of every checkpoint of this shape, fp32; matrices only, an equal number of each."""
    bounds: np.ndarray
    """Where each matrix begins in `sample`, and its end."""


def fingerprint(path: Path) -> Fingerprint:
    """Read the checkpoint at `path` (any format that opens here). Raises CheckpointError if it is damaged."""
    weights = open_weights(path)
    matrices = [name for name, tensor in sorted(weights.tensors.items()) if len(tensor.shape) == 2]
    quota = min(max(SAMPLE // max(len(matrices), 1), 64), 65_536)
    hashes: dict[str, str] = {}
    samples, zero = [], []
    square, nan, infinite = 0.0, 0, 0

    def measured() -> Iterator[tuple[str, Tensor]]:
        """Each tensor in name order, measured on its way to the hash, so that each is read once."""
        nonlocal square, nan, infinite
        for name in sorted(weights.tensors):
            tensor = weights.tensors[name].load()
            hashes[name] = hash_tensors([(name, tensor)])
            wide = tensor.contiguous().float()
            finite = wide.isfinite()
            if not finite.all():
                nan += int(wide.isnan().sum())
                infinite += int(wide.isinf().sum())
                wide = torch.where(finite, wide, torch.zeros_like(wide))
            norm = float(torch.linalg.vector_norm(wide, dtype=torch.float64))
            square += norm * norm
            if tensor.ndim == 2:
                samples.append(_sample(wide, quota, name))
                if norm == 0.0:
                    zero.append(name)
            yield name, tensor

    whole = hash_tensors(measured())
    folder = path if path.is_dir() else path.parent
    tokenizer = next((folder / name for name in _TOKENIZERS if (folder / name).is_file()), None)
    return Fingerprint(
        model=weights.model,
        dtype=str(weights.dtype).removeprefix("torch."),
        tokenizer=sha256_file(tokenizer) if tokenizer else None,
        hashes=hashes,
        hash=whole,
        norm=square**0.5,
        nan=nan,
        infinite=infinite,
        zero=tuple(zero),
        sample=np.concatenate(samples) if samples else np.empty(0, np.float32),
        bounds=np.cumsum([0, *(len(v) for v in samples)]),
    )


def _sample(wide: Tensor, count: int, name: str) -> np.ndarray:
    """`count` values of a tensor, at places that depend on its name and size alone; all of a smaller one."""
    flat = wide.reshape(-1)
    if flat.numel() <= count:
        return flat.numpy().copy()
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    places = np.random.default_rng(seed).integers(0, flat.numel(), count)
    return flat.numpy()[places]


def distance_matrix(prints: list[Fingerprint]) -> tuple[np.ndarray, np.ndarray]:
    """Distances and cosines (n, n) between checkpoints of one shape, each the mean over all matrices.

    The distance of two matrices a, b is |a − b| / sqrt(|a|·|b|), from the sampled values: 0 for equal ones, about
    1.4 for unrelated ones of the same norm.
    """
    n = len(prints)
    distance, cosine = np.zeros((n, n)), np.ones((n, n))
    if not n:
        return distance, cosine
    bounds = prints[0].bounds
    total = np.zeros((2, n, n))
    for start, stop in pairwise(bounds):
        rows = np.stack([p.sample[start:stop] for p in prints]).astype(np.float64)
        norms = np.maximum(np.linalg.norm(rows, axis=1), 1e-30)
        for i in range(n):  # differences, not a Gram matrix: near neighbours would cancel in it
            scale = np.sqrt(norms[i] * norms)
            total[0, i] += np.linalg.norm(rows - rows[i], axis=1) / scale
            total[1, i] += rows @ rows[i] / (norms[i] * norms)
    mean = total / max(len(bounds) - 1, 1)
    return mean[0], mean[1]
