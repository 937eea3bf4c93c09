"""lit-gpt's checkpoints, both ways: TinyLlama's `.pth` (2023) and current litgpt's `lit_model.pth` with its YAML.

Two dialects of one layout, recognized by their names:

| here                    | TinyLlama's lit_gpt  | litgpt          |
|-------------------------|----------------------|-----------------|
| q, k, v rows            | `attn.attn`, below   | `attn.qkv`      |
| gate, up, down          | `mlp.swiglu.w1 w2 w3`| `mlp.fc_1 fc_2 proj` |

`attn.attn` interleaves per group of heads that share a key: rows (groups, q per group + k + v, D).
`attn.qkv` has all q, then all k, then all v. (jzhang38/TinyLlama:lit_gpt/model.py; Lightning-AI/litgpt:litgpt/model.py)
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError
from tinylab.formats.litgpt_config import find_config, model_to_litgpt, write_yaml
from tinylab.formats.tensors import LazyTensor, Weights
from tinylab.formats.torch_archive import TorchArchive
from tinylab.model.names import to_huggingface
from tinylab.model.transformer import Llama
from tinylab.runs.durable import disk_error

Dialect = Literal["litgpt", "tinyllama"]
WEIGHTS = "lit_model.pth"
_TOP = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    "norm_1.weight": "input_layernorm.weight",
    "attn.proj.weight": "self_attn.o_proj.weight",
    "norm_2.weight": "post_attention_layernorm.weight",
}
_MLP: dict[Dialect, dict[str, str]] = {
    "tinyllama": {
        "mlp.swiglu.w1.weight": "mlp.gate_proj.weight",
        "mlp.swiglu.w2.weight": "mlp.up_proj.weight",
        "mlp.swiglu.w3.weight": "mlp.down_proj.weight",
    },
    "litgpt": {
        "mlp.fc_1.weight": "mlp.gate_proj.weight",
        "mlp.fc_2.weight": "mlp.up_proj.weight",
        "mlp.proj.weight": "mlp.down_proj.weight",
    },
}
_FUSED: dict[Dialect, str] = {"tinyllama": "attn.attn.weight", "litgpt": "attn.qkv.weight"}
_READ = _LAYER | _MLP["tinyllama"] | _MLP["litgpt"]
_NAME = re.compile(r"transformer\.h\.(\d{1,6})\.(.+)")


def open_checkpoint(path: str | Path, model: Model | None = None) -> Weights:
    """A lit-gpt checkpoint, opened without unpickling: wrapped in `model` beside an optimizer, or a bare state dict.

    model: its configuration; absent, it is looked up in the file, in `model_config.yaml`, `lit_config.json` or
    `config.json` beside it, and by the name or exact shapes of TinyLlama's models. Raises CheckpointError if
    there is none, for files that are not a state dict, and for hostile ones (formats/safe_pickle.py).
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    archive = TorchArchive(file)
    value = archive.value
    wrapped = isinstance(value, dict) and isinstance(value.get("model"), dict)
    found = archive.tensors(value["model"] if wrapped else value)
    if not found:
        raise CheckpointError(f"{file} must hold a state dict, bare or under the key model; found no tensors there")
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}
    if "transformer.wte.weight" not in tensors:
        raise CheckpointError(
            f"{file} must hold lit-gpt's names (transformer.wte.weight, …); found {', '.join(list(tensors)[:3])}, …"
        )
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    model = model or find_config(file, value if wrapped else {}, shapes)
    embed, head = tensors["transformer.wte.weight"], tensors.get("lm_head.weight")
    tied = head is None or head.storage == embed.storage  # the file says whether they are the same bytes
    return Weights(replace(model, tie_embeddings=tied), _rename(tensors, model), str(file))


def _rename(tensors: dict[str, LazyTensor], model: Model) -> dict[str, LazyTensor]:
    """Lazy tensors under Hugging Face's names; names that are not lit-gpt's stay, to be reported with the others."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            result[_TOP.get(name, name)] = tensor
            continue
        prefix, rest = f"model.layers.{found[1]}.", found[2]
        if rest in _FUSED.values():
            parts = _split(tensor, model, interleaved=rest == _FUSED["tinyllama"])
            result |= {f"{prefix}self_attn.{part}_proj.weight": piece for part, piece in zip("qkv", parts, strict=True)}
        elif rest in _READ:
            result[prefix + _READ[rest]] = tensor
        else:
            result[name] = tensor
    return result


def _split(fused: LazyTensor, model: Model, *, interleaved: bool) -> list[LazyTensor]:
    """q, k and v of a fused matrix, read once for the three of them when they are asked for in turn."""
    sizes = [model.n_head * model.head_size] + [model.n_kv_head * model.head_size] * 2
    if fused.shape != (sum(sizes), model.d_model):
        wrong = LazyTensor(fused.shape, fused.dtype, fused.load)  # keeps its shape, so that it is listed as misshaped
        return [wrong, wrong, wrong]
    kept: list[Tensor] = []

    def piece(index: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            if not kept:
                rows = fused.load()
                kept.extend(split_interleaved(rows, model) if interleaved else rows.split(sizes))
            part = kept[index]
            if index == 2:
                kept.clear()
            return part

        return read

    return [LazyTensor((size, model.d_model), fused.dtype, piece(i)) for i, size in enumerate(sizes)]


def split_interleaved(rows: Tensor, model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """q (H·D, C), k and v (K·D, C) of TinyLlama's `attn.attn.weight`: rows (K, H/K + 2, D)."""
    groups, D = model.n_kv_head, model.head_size
    per_group = rows.view(groups, model.n_head // groups + 2, D, -1)
    q, k, v = per_group.split((model.n_head // groups, 1, 1), dim=1)
    return tuple(part.reshape(-1, rows.shape[1]) for part in (q, k, v))  # pyright: ignore[reportReturnType]


def interleave(q: Tensor, k: Tensor, v: Tensor, model: Model) -> Tensor:
    """The inverse of `split_interleaved`."""
    groups, D = model.n_kv_head, model.head_size
    parts = [part.view(groups, -1, D, part.shape[1]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, q.shape[1])


def to_litgpt(model: Llama, dialect: Dialect = "litgpt") -> dict[str, Tensor]:
    """The state dict that lit-gpt loads. A tied head shares the embedding's memory, as litgpt's converter leaves it."""
    config = model.config
    theirs = to_huggingface(model.state_dict(), config)
    top = {ours: theirs.get(name, theirs["model.embed_tokens.weight"]) for ours, name in _TOP.items()}
    state = {"lm_head.weight": top["lm_head.weight"], "transformer.wte.weight": top["transformer.wte.weight"]}
    for i in range(config.n_layer):
        ours, prefix = f"transformer.h.{i}.", f"model.layers.{i}."
        q, k, v = (theirs[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv")
        fused = (
            interleave(q, k, v, config) if dialect == "tinyllama" else model.state_dict()[f"blocks.{i}.attn.qkv.weight"]
        )
        state[ours + _FUSED[dialect]] = fused
        state |= {ours + name: theirs[prefix + part] for name, part in (_LAYER | _MLP[dialect]).items()}
    return state | {"transformer.ln_f.weight": top["transformer.ln_f.weight"]}


def save_pth(model: Llama, path: str | Path, dialect: Dialect = "tinyllama") -> None:
    """Write a `.pth` for lit-gpt: bare for `litgpt`, under `model` with a plain `config` beside it for `tinyllama`.

    It is a pickle of tensors, because lit-gpt reads nothing else. Giving the file its final name is up to the caller.
    Raises CheckpointError (full disk, no permission).
    """
    path = Path(path)
    state: dict[str, Any] = to_litgpt(model, dialect)
    value = state if dialect == "litgpt" else {"model": state, "config": model_to_litgpt(model.config)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(value, file)
    except OSError as error:
        raise disk_error(path, error) from error
    except RuntimeError as error:  # torch's writer turns a failed write into its own error
        cause = error.__context__
        raise disk_error(path, cause if isinstance(cause, OSError) else OSError(str(error))) from error


def save_folder(model: Llama, folder: str | Path) -> None:
    """Write what litgpt loads: `lit_model.pth` (a bare state dict) and `model_config.yaml`."""
    folder = Path(folder)
    save_pth(model, folder / WEIGHTS, "litgpt")
    write_yaml(model_to_litgpt(model.config), folder / "model_config.yaml")
