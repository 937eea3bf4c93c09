"""From one checkpoint format to another: read as a stream, written under a temporary name, compared, then renamed."""

import math
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.data.tokenizer.load import load_tokenizer_file
from tinylab.data.tokenizer.sentencepiece_model import serialize
from tinylab.errors import CheckpointError, ConfigError
from tinylab.formats import litgpt
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import read_object, write_config
from tinylab.formats.llama2c_tokenizer import find_tokenizer, read_tokenizer
from tinylab.formats.load import load_folder
from tinylab.model.transformer import Llama
from tinylab.runs.durable import disk_error, fsync_path
from tinylab.runs.manifest import commit_folder, temporary_folder

Format = Literal["huggingface", "litgpt", "tinyllama"]
"""A Hugging Face folder; litgpt's folder (`lit_model.pth`, `model_config.yaml`); TinyLlama's lone `.pth`."""
_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    "generation_config.json",
)


@dataclass(frozen=True)
class Conversion:
    """What was written, and how far its logits are from the source's."""

    source: str
    target: Path
    format: Format
    parameters: int
    dtype: str
    max_difference: float
    """Largest absolute difference of a logit from the source, as stored, on a fixed random batch of 2 sequences: 0 in
    the source's dtype; in another one, what rounding the weights to it has changed."""
    largest_logit: float
    """Largest absolute logit of the source on that batch: the scale of `max_difference`."""
    seconds: float
    tokenizer: str | None = None
    """llama2.c's tokenizer file that was converted with its model; None where there was none."""

    def __str__(self) -> str:
        return (
            f"{self.source} → {self.target} ({self.format}, {self.parameters:,} parameters, {self.dtype}) in "
            f"{self.seconds:.1f} s; largest difference of logits {self.max_difference:g} (largest logit "
            f"{self.largest_logit:.3g})" + (f"; tokenizer from {self.tokenizer}" if self.tokenizer else "")
        )


def convert(
    source: str | Path,
    target: str | Path,
    format: Format | None = None,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> Conversion:
    """Write the model at the path `source` to `target`, and compare the logits of both.

    format: absent, `tinyllama` for a target that ends in `.pth`, else `huggingface`. dtype: absent, as stored. The
    tokenizer's files go along; tokenizer: llama2.c's own file, absent, the one beside the model. Needs the model once
    in memory. Nothing is left under the final name on failure. Raises CheckpointError: a damaged or hostile source,
    tensors that do not fit (all listed), a target that exists, a full disk, logits that are not finite, logits that
    differ for another reason than the rounding of weights to `dtype`.
    """
    start = time.perf_counter()
    source, target = Path(source), Path(target).expanduser().absolute()
    kind = _format(target, format)
    if target.exists():
        raise CheckpointError(f"{target} must not exist; move it aside, or choose another name")
    model = load_folder(source)
    stored, original = model.head.weight.dtype, sample_logits(model)
    if dtype not in (None, stored):
        model = model.to(dtype)
    cast = original if model.head.weight.dtype == stored else sample_logits(model)
    _require_finite(source, target, model, original, cast)
    name, parameters = str(model.head.weight.dtype).removeprefix("torch."), sum(p.numel() for p in model.parameters())
    tokenizer = _tokenizer(source, model.config, kind, tokenizer)
    temporary = temporary_folder(target)
    try:
        written = _write(model, source, tokenizer, temporary, target, kind)
        limit = rounding_limit(model.config, model.head.weight.dtype) * max(float(cast.abs().max()), 1.0)
        del model
        found = sample_logits(load_folder(written))
        difference = _difference(cast, found)
        if not difference <= limit:
            raise CheckpointError(
                f"{target} must give the logits of {source}; the largest difference is {difference:g}, where {limit:g} "
                "can be rounding. Nothing was kept: please report this"
            )
        _publish(written, temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    scale, seconds = float(original.abs().max()), time.perf_counter() - start
    difference, beside = _difference(original, found), tokenizer and tokenizer.name
    return Conversion(str(source), target, kind, parameters, name, difference, scale, seconds, beside)


def rounding_limit(config: Model, dtype: torch.dtype) -> float:
    """How far two evaluations of the same weights in `dtype` may be apart, relative to the largest logit.

    A conversion is judged by the logits of the written file against those of the model in memory that was written,
    already cast: the same weights in the same dtype, so that the cast plays no part, however coarse it is. They are
    equal unless sums are taken in another order, as they may be for memory of another alignment. Then a sum of K
    products in fp32 changes by e = 2^-24·sqrt(K) of its size. A coarser dtype turns this into a change of one unit, 2u,
    in a share e / 2u of the results: sqrt(2u·e) in the root mean square. The 2L sublayers and the head add such errors
    independently, sqrt(2L + 1) of them; three times that is the limit. For TinyLlama 1.1B: 9e-5 in fp32, 0.004 in
    bf16, 0.001 in fp16. Wrong rows, a wrong base or epsilon change logits by a hundredth of their size and more.
    """
    e, unit = 2**-24 * math.sqrt(max(config.d_model, config.d_ff)), torch.finfo(dtype).eps
    return 3 * math.sqrt(e * max(e, unit) * (2 * config.n_layer + 1))


def _require_finite(source: Path, target: Path, model: Llama, original: Tensor, cast: Tensor) -> None:
    given, kept = (float(logits.isfinite().double().mean()) for logits in (original, cast))
    if given < 1:
        raise CheckpointError(
            f"{source} must give finite logits; {given:.2%} of them are finite. Its weights are damaged or diverged: "
            "convert an earlier checkpoint"
        )
    if kept < 1:
        dtype = model.head.weight.dtype
        raise CheckpointError(
            f"{target} must give finite logits; in {str(dtype).removeprefix('torch.')} {kept:.2%} of them are finite, "
            f"in the source all. Values exceed the largest of this dtype, {torch.finfo(dtype).max:g}: take bf16 or fp32"
        )


def _format(target: Path, format: Format | None) -> Format:
    kind: Format = format or ("tinyllama" if target.suffix == ".pth" else "huggingface")
    if kind not in get_args(Format):
        raise ConfigError(f"format must be one of {', '.join(get_args(Format))}; found {format!r}")
    if (kind == "tinyllama") != (target.suffix == ".pth"):
        raise ConfigError(f"format tinyllama is one file that ends in .pth, the others are folders; found {target}")
    return kind


def _tokenizer(source: Path, model: Model, kind: Format, given: str | Path | None) -> Path | None:
    """llama2.c's tokenizer file to convert: the one given, or one beside the model; None for other formats."""
    if given is not None and (source.suffix != ".bin" or kind == "tinyllama"):
        raise ConfigError(
            f"tokenizer is for a llama2.c .bin that becomes a folder; found {source} and format {kind}: leave it out"
        )
    if source.suffix != ".bin" or kind == "tinyllama":
        return None
    return find_tokenizer(source, model.vocab_size) if given is None else Path(given).expanduser()


def _write(model: Llama, source: Path, tokenizer: Path | None, temporary: Path, target: Path, kind: Format) -> Path:
    if kind == "tinyllama":
        litgpt.save_pth(model, temporary / target.name, "tinyllama")
        return temporary / target.name
    folder = source if source.is_dir() else source.parent
    if kind == "litgpt":
        litgpt.save_folder(model, temporary)
    else:
        save_weights(model.state_dict(), model.config, temporary)
        bos, eos = (1, 2) if source.suffix == ".bin" else _special_ids(folder)  # llama2.c's are fixed
        dtype = str(model.head.weight.dtype).removeprefix("torch.")
        write_config(model.config, temporary, bos_id=bos, eos_id=eos, dtype=dtype)
    try:
        if tokenizer is not None:
            (temporary / "tokenizer.model").write_bytes(serialize(read_tokenizer(tokenizer, model.config.vocab_size)))
            load_tokenizer_file(temporary).save(temporary)
            return temporary
        for name in _COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
    except OSError as error:
        raise disk_error(temporary, error) from error
    return temporary


def _special_ids(folder: Path) -> tuple[int | None, int | None]:
    """bos and eos of the source's configuration; None where it has none."""
    values: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        with suppress(CheckpointError):
            values |= read_object(folder / name)
    bos, eos = (values.get(key) for key in ("bos_token_id", "eos_token_id"))
    return bos if type(bos) is int else None, eos if type(eos) is int else None


def _publish(written: Path, temporary: Path, target: Path) -> None:
    """Give the finished file or folder its final name, on the device before that."""
    if written == temporary:
        commit_folder(temporary, target)
        return
    try:
        fsync_path(written)
        if target.exists():
            raise CheckpointError(f"{target} must not exist; another process has made it. Nothing was kept")
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
    """Largest absolute difference; infinite for other shapes and for logits that are not finite."""
    return float((a - b).abs().nan_to_num(nan=math.inf).max()) if a.shape == b.shape else math.inf
