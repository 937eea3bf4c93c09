"""config.json of a Llama, both ways: what tinylab computes exactly is read, everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinylab.config.architecture import Model, RopeScaling
from tinylab.errors import CheckpointError, ConfigError
from tinylab.runs.durable import disk_error

MAX_CONFIG_BYTES = 1_000_000
MAX_YAML_BYTES = 200_000
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_READ = {
    *_REQUIRED,
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "tie_word_embeddings", "initializer_range"),
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], ["LlamaModel"], ["LLaMAForCausalLM"]),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
"""Keys that must have one of these values, or be absent."""
_HARMLESS = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "pretraining_tp", "pad_token_id"),
    *("bos_token_id", "eos_token_id", "unk_token_id", "attention_dropout", "is_llama_config", "unsloth_version"),
    *("unsloth_fixed", "transformers.js_config", "_attn_implementation_autoset", "_flash_attn_2_enabled", "auto_map"),
    *("return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "task_specific_params"),
    *("finetuning_task", "problem_type", "chunk_size_feed_forward", "max_sequence_length", "resid_pdrop"),
    *("is_decoder", "tokenizer_class", "prefix", "torchscript", "hidden_dropout"),
}
"""Keys that do not change what the model computes (dropout is off outside training elsewhere)."""
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""What rope_scaling (rope_parameters in transformers 5) must give, by its type."""
_ROPE_READ = {*_ROPE_NEEDS["llama3"], "rope_theta", "rope_type", "type", "original_max_position_embeddings"}
"""All other keys of it may change the model."""


def config_values(config: Model) -> dict[str, Any]:
    """What config.json says of the model itself, under transformers' names."""
    scaling = config.rope_scaling
    rope = None if scaling is None else {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if rope is not None and scaling is not None and scaling.rope_type == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_seq_len,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_size,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "use_cache": True,
    }


def write_config(
    config: Model,
    folder: str | Path,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    dtype: str = "float32",
) -> None:
    """Write config.json and generation_config.json, such that transformers builds the same model.

    Raises CheckpointError when the folder cannot be written.
    """
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    values = config_values(config) | {"torch_dtype": dtype, **ids}
    try:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("config.json", values), ("generation_config.json", ids)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise disk_error(Path(folder), error) from error


def model_from_config(source: dict[str, Any] | str | Path) -> Model:
    """The model that a config.json (or its values) describes.

    Raises CheckpointError naming every key that makes it something other than the Llama tinylab computes.
    """
    values, where = (source, "config.json") if isinstance(source, dict) else (read_object(Path(source)), str(source))
    problems = [f"{key} must be given" for key in _REQUIRED if values.get(key) is None]
    for key, value in values.items():
        if key in _FIXED:
            if value is not None and value not in _FIXED[key]:
                problems.append(f"{key} must be {' or '.join(map(repr, _FIXED[key]))}; found {value!r}")
        elif key not in _READ and key not in _HARMLESS and value not in (None, False):
            problems.append(f"{key} = {value!r} is unknown and may change the model")
    if values.get("model_type") is None:
        problems.append("model_type must be 'llama'; found none")
    if problems:
        raise CheckpointError(f"{where} must describe a Llama that tinylab computes exactly: {'; '.join(problems)}")
    try:
        return _model(values)
    except (ConfigError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{where} cannot be used: {error}") from error


def _model(values: dict[str, Any]) -> Model:
    def take(key: str, kind: type, default: Any = None) -> Any:
        value = values.get(key)
        value = default if value is None else value
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{key} must be of type {kind.__name__}; found {value!r}")
        return kind(value)

    heads, width = take("num_attention_heads", int), take("hidden_size", int)
    head_dim = take("head_dim", int, width // max(heads, 1))
    theta, scaling = _rope(values, take("max_position_embeddings", int, 2048))
    return Model(
        vocab_size=take("vocab_size", int),
        n_layer=take("num_hidden_layers", int),
        d_model=width,
        n_head=heads,
        n_kv_head=take("num_key_value_heads", int, heads),
        d_ff=take("intermediate_size", int),
        d_head=None if head_dim * heads == width else head_dim,
        seq_len=take("max_position_embeddings", int, 2048),
        norm_eps=take("rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=take("tie_word_embeddings", bool, False),
        init="normal",
        init_std=take("initializer_range", float, 0.02) or 0.02,
    )


def _rope(values: dict[str, Any], seq_len: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_scaling must be an object; found {rope!r}")
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_NEEDS:
        raise ConfigError(f"rope_scaling.rope_type must be default, linear or llama3; found {kind!r}")
    for key, value in rope.items():
        is_whole = key == "partial_rotary_factor" and value in _FIXED[key]
        if key not in _ROPE_READ and value is not None and not is_whole:
            raise ConfigError(f"rope_scaling.{key} = {value!r} is unknown and may change the model")
    missing = [key for key in _ROPE_NEEDS[kind] if rope.get(key) is None]
    if missing:
        raise ConfigError(f"rope_scaling of type {kind} must give {', '.join(missing)}; found none")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(rope_type="linear", factor=float(rope["factor"]))
    return theta, RopeScaling(
        rope_type="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_seq_len=int(rope.get("original_max_position_embeddings") or seq_len),
    )


def read_object(path: Path) -> dict[str, Any]:
    """A small file of named values, YAML or JSON by its suffix. Raises CheckpointError for anything else."""
    limit = MAX_YAML_BYTES if path.suffix == ".yaml" else MAX_CONFIG_BYTES
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path} must be at most {limit} bytes; found {path.stat().st_size}")
        text = path.read_text(encoding="utf-8")
        values = _parse_yaml(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read the model's configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold named values; found {type(values).__name__}")
    return values


def _parse_yaml(text: str) -> Any:
    import yaml  # not for every config.json: opening a model should take no longer for it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
