"""One checkpoint format to another: read as a stream, written beside its final name, compared, then renamed."""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tinylab.catalog.reference import Reference, resolve_reference
from tinylab.errors import CheckpointError, ConfigError
from tinylab.formats import litgpt
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.formats.load import load_folder, open_weights
from tinylab.formats.tensors import load_weights
from tinylab.model.transformer import Llama
from tinylab.runs.durable import disk_error, fsync_path
from tinylab.runs.manifest import TEMPORARY_PREFIX, commit_folder, temporary_folder

Format = Literal["huggingface", "litgpt", "tinyllama"]
"""A Hugging Face folder; litgpt's folder (`lit_model.pth`, `model_config.yaml`); TinyLlama's lone `.pth`."""
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    "generation_config.json",
)
_LIMITS = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of logits, relative to the largest logit, that rounding can explain. The same weights in the same
code give 0; more than this is a wrong conversion."""


@dataclass(frozen=True)
class Conversion:
    """What was written, and how far its logits are from the source's."""

    source: str
    target: Path
    format: Format
    parameters: int
    dtype: str
    max_difference: float
    """Largest absolute difference of a logit on a fixed random batch of 2 sequences; 0 is expected."""
    largest_logit: float
    """Largest absolute logit of the source on that batch: the scale of `max_difference`."""
    seconds: float
    notes: tuple[str, ...] = ()
    """What the source's REF has to say, such as a nearest match."""

    def __str__(self) -> str:
        return (
            f"{self.source} → {self.target} ({self.format}, {self.parameters:,} parameters, {self.dtype}) in "
            f"{self.seconds:.1f} s; largest difference of logits {self.max_difference:g} (largest logit "
            f"{self.largest_logit:.3g})" + "".join(f"\nnote: {note}" for note in self.notes)
        )


def convert(
    source: str | Path | Reference,
    target: str | Path,
    format: Format | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Write the model that REF `source` names to `target` and compare the logits of both.

    format: absent, `tinyllama` for a target that ends in `.pth`, else `huggingface`. dtype: absent, as stored. The
    tokenizer's files go along. Needs the model once in memory. Nothing is left under the final name on failure.
    Raises CheckpointError: a damaged or hostile source, tensors that do not fit (all listed), a target that exists,
    a full disk, logits that differ by more than rounding.
    """
    start = time.perf_counter()
    target = Path(target).expanduser().absolute()
    kind = _format(target, format)
    if target.exists():
        raise CheckpointError(f"{target} must not exist; move it aside, or choose another name")
    reference = resolve_reference(source)
    model = load_weights(open_weights(reference.path), dtype=dtype, copy=True)
    expected = sample_logits(model)
    parameters, stored = sum(p.numel() for p in model.parameters()), model.head.weight.dtype
    temporary = _own_folder(target)
    try:
        written = _write(model, reference.path, temporary, target, kind)
        del model
        load = load_folder if kind == "huggingface" else litgpt.load  # the way by which anybody opens it
        found = sample_logits(load(written))
        difference, scale = _difference(expected, found), float(expected.abs().nan_to_num(0.0).max())
        if not difference <= _LIMITS.get(stored, 0.0) * max(scale, 1.0):
            raise CheckpointError(
                f"{target} must give the logits of {source}; the largest difference is {difference:g} at a largest "
                f"logit of {scale:g}. Nothing was kept: please report this"
            )
        _publish(written, temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    seconds = time.perf_counter() - start
    name = str(stored).removeprefix("torch.")
    label, notes = str(reference.label), reference.notes
    return Conversion(label, target, kind, parameters, name, difference, scale, seconds, notes)


def _own_folder(target: Path) -> Path:
    """A temporary folder of this process alone, which no other that writes the same target finds.

    Those of processes of this machine that were killed are removed.
    """
    mine = f"{target.name}.{socket.gethostname()}."
    for left in target.parent.glob(f"{TEMPORARY_PREFIX}{glob.escape(mine)}*"):
        try:
            os.kill(int(left.suffix[1:]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (OSError, ValueError):
            continue  # another user's process, or no folder of ours
    return temporary_folder(target.with_name(f"{mine}{os.getpid()}"))


def _format(target: Path, format: Format | None) -> Format:
    kind: Format = format or ("tinyllama" if target.suffix == ".pth" else "huggingface")
    if kind not in get_args(Format):
        raise ConfigError(f"format must be one of {', '.join(get_args(Format))}; found {format!r}")
    if (kind == "tinyllama") != (target.suffix == ".pth"):
        raise ConfigError(f"format tinyllama is one file that ends in .pth, the others are folders; found {target}")
    return kind


def _write(model: Llama, source: Path, temporary: Path, target: Path, kind: Format) -> Path:
    """Write everything below `temporary`; the path that becomes `target`."""
    if kind == "tinyllama":
        litgpt.save_pth(model, temporary / target.name, "tinyllama")
        return temporary / target.name
    folder = source if source.is_dir() else source.parent
    if kind == "litgpt":
        litgpt.save_folder(model, temporary)
    else:
        save_weights(model.state_dict(), model.config, temporary)
        ids = _special_ids(folder)
        dtype = str(model.head.weight.dtype).removeprefix("torch.")
        write_config(model.config, temporary, bos_id=ids["bos_token_id"], eos_id=ids["eos_token_id"], dtype=dtype)
    for name in _TOKENIZER:
        if (folder / name).is_file():
            try:
                shutil.copyfile(folder / name, temporary / name)
            except OSError as error:
                raise disk_error(temporary / name, error) from error
    return temporary


def _special_ids(folder: Path) -> dict[str, int | None]:
    """bos and eos of the source's configuration; None where it has none."""
    values: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        values |= found if isinstance(found, dict) else {}
    ids = {key: values.get(key) for key in ("bos_token_id", "eos_token_id")}
    return {k: v if isinstance(v, int) and not isinstance(v, bool) else None for k, v in ids.items()}


def _publish(written: Path, temporary: Path, target: Path) -> None:
    """Give the finished file or folder its final name, on the device before that."""
    if written == temporary:
        commit_folder(temporary, target)
        return
    try:
        fsync_path(written)
        if target.exists():
            raise CheckpointError(f"{target} must not exist; another process made it meanwhile. Nothing was kept")
        os.rename(written, target)
        fsync_path(target.parent)
    except OSError as error:
        raise disk_error(target, error) from error
    shutil.rmtree(temporary, ignore_errors=True)


@torch.inference_mode()
def sample_logits(model: Llama) -> Tensor:
    """Logits (2, T, V) in fp32 on the fixed batch: 2 sequences of up to 32 random ids."""
    length = min(32, model.config.seq_len)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    return model(ids).float()


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN and infinity count as equal to themselves only."""
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, torch.zeros_like(a), (a - b).abs().nan_to_num(nan=torch.inf)).max())
