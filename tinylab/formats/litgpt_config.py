"""lit-gpt's model configuration, both ways: `model_config.yaml`, `lit_config.json`, or TinyLlama's known shapes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinylab.config.architecture import Model, RopeScaling
from tinylab.config.presets import tinyllama_1b, tinyllama_120m
from tinylab.errors import CheckpointError, ConfigError
from tinylab.formats.huggingface_config import misfits, model_from_config, read_object, scaling_values, take
from tinylab.runs.durable import write_atomic

KNOWN = {"tiny_LLaMA_1b": tinyllama_1b().model, "tiny_LLaMA_120M": tinyllama_120m().model}
"""TinyLlama's models by the name in its `.pth` (hparams) and lit_gpt/config.py."""
_OFF = (
    *("bias", "attn_bias", "lm_head_bias", "parallel_residual", "shared_attention_norm", "norm_qk"),
    *("post_attention_norm", "post_mlp_norm", "scale_embeddings", "rope_interleave"),
)
_NULL = (
    *("sliding_window_size", "attention_logit_softcapping", "final_logit_softcapping", "latent_attention"),
    *("rope_local_base_freq", "rope_indices"),
)
_FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_OFF, (False,)),
    **dict.fromkeys(_NULL, ()),
    "norm_class_name": ("RMSNorm",),
    "_norm_class": ("RMSNorm", "FusedRMSNorm"),
    "mlp_class_name": ("LLaMAMLP",),
    "_mlp_class": ("LLaMAMLP",),
    "rotary_percentage": (1.0,),
    "norm_1": (True,),
    "norm_2": (True,),
    "n_expert": (0,),
}
"""Keys that must have one of these values, or be null or absent: everything else would be another model."""
_FIELDS = {
    "d_model": "n_embd",
    "vocab_size": "padded_vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_kv_head": "n_query_groups",
    "d_ff": "intermediate_size",
    "seq_len": "block_size",
}
"""Our counts, and litgpt's names."""
_ORIGINAL = "original_max_seq_len"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
"""What `rope_adjustments` of Llama 3's kind give."""
_DEFAULTS = {
    ("norm_class_name", "_norm_class"): "LayerNorm",
    ("mlp_class_name", "_mlp_class"): "GptNeoxMLP",
    ("rotary_percentage",): "0.25",
    ("parallel_residual",): "true",
}
"""Keys that must not be absent, by any of their names: litgpt would then build another model."""


def find_config(file: Path, archive: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Model:
    """The configuration of a `.pth`: in it, beside it, or that of the TinyLlama model that it names
    or whose shapes it has.

    Raises CheckpointError when none is found: the head size does not follow from the weights.
    """
    if isinstance(archive.get("config"), dict):
        return model_from_litgpt(archive["config"], f"{file}: config")
    for name in ("model_config.yaml", "lit_config.json"):
        if (file.parent / name).is_file():
            return model_from_litgpt(read_object(file.parent / name), str(file.parent / name))
    if (file.parent / "config.json").is_file():
        return model_from_config(file.parent / "config.json")
    hparams = archive.get("hparams")
    named = hparams.get("model_name") if isinstance(hparams, dict) else None
    if isinstance(named, str) and named in KNOWN:
        return KNOWN[named]
    for model in KNOWN.values():
        rows = (model.n_head + 2 * model.n_kv_head) * model.head_size
        expected = {
            "transformer.wte.weight": (model.vocab_size, model.d_model),
            "transformer.h.0.attn.attn.weight": (rows, model.d_model),
            "transformer.h.0.mlp.swiglu.w1.weight": (model.d_ff, model.d_model),
            f"transformer.h.{model.n_layer - 1}.norm_2.weight": (model.d_model,),
        }
        if f"transformer.h.{model.n_layer}.norm_1.weight" not in shapes and expected.items() <= shapes.items():
            return model
    raise CheckpointError(
        f"{file} must come with its configuration, because weights do not tell the number of heads; found none. "
        f"Put litgpt's model_config.yaml, lit_config.json or a Hugging Face config.json into {file.parent}"
    )


def model_from_litgpt(values: Mapping[str, Any], where: str) -> Model:
    """The model that litgpt's Config fields describe. Raises CheckpointError naming all that is no plain Llama."""
    problems = misfits(values, _FIXED)
    for names, default in _DEFAULTS.items():
        if not any(name in values for name in names):
            problems.append(f"{names[0]} must be given; litgpt's default is {default}")
    try:
        given = {"n_query_groups": values.get("n_head")} | {k: v for k, v in values.items() if v is not None}
        counts = {ours: take(given, theirs, int) for ours, theirs in _FIELDS.items()}
        size = take(given, "head_size", int, counts["d_model"] // counts["n_head"])
        if values.get("attention_scores_scalar") not in (None, size):
            problems.append(f"attention_scores_scalar must be null or the head size {size}")
        if problems:
            raise CheckpointError(f"{where} must describe a Llama that tinylab computes exactly: {'; '.join(problems)}")
        return Model(
            **counts,
            d_head=None if size * counts["n_head"] == counts["d_model"] else size,
            norm_eps=float(values.get("norm_eps", 1e-5)),
            rope_theta=float(values.get("rope_base", 10_000)),
            rope_scaling=_scaling(values),
        )
    except (ConfigError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where} must hold litgpt's model configuration; found a problem: {error}") from error


def _scaling(values: Mapping[str, Any]) -> RopeScaling | None:
    """Linear scaling from `rope_condense_ratio` or a single factor; Llama 3's from its four values."""
    ratio = values.get("rope_condense_ratio", values.get("condense_ratio", 1))
    changed = values.get("rope_adjustments")
    if not changed:
        return None if ratio == 1 else RopeScaling(rope_type="linear", factor=float(ratio))
    if ratio != 1:
        raise ValueError("rope_condense_ratio and rope_adjustments exclude each other")
    if set(changed) == {"factor"}:
        return RopeScaling(rope_type="linear", factor=float(changed["factor"]))
    if set(changed) != set(_LLAMA3):
        raise ValueError(f"rope_adjustments must be linear or Llama 3's; found {', '.join(map(str, changed))}")
    factors = {key: float(changed[key]) for key in _LLAMA3[:3]}
    return RopeScaling(rope_type="llama3", **factors, original_seq_len=int(changed[_ORIGINAL]))


def model_to_litgpt(model: Model) -> dict[str, Any]:
    """litgpt's Config fields of a model, plain values only; `Config(**fields)` builds it."""
    return {
        "name": "tinylab",
        "vocab_size": model.vocab_size,
        **{theirs: getattr(model, ours) for ours, theirs in _FIELDS.items()},
        "head_size": model.head_size,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": model.norm_eps,
        "mlp_class_name": "LLaMAMLP",
        "rope_base": int(model.rope_theta) if model.rope_theta.is_integer() else model.rope_theta,
        "rope_condense_ratio": 1,
        "rope_adjustments": scaling_values(model.rope_scaling, _ORIGINAL) if model.rope_scaling else None,
    }


def write_yaml(values: Mapping[str, Any], path: Path) -> None:
    """Plain values as YAML: JSON scalars, which are YAML, one key a line. Raises CheckpointError on a full disk."""
    write_atomic(path, "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
