"""config.json of a Llama, both ways: what tinylab computes exactly is read, everything else is refused by name."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinylab.config.architecture import Model, RopeScaling
from tinylab.errors import CheckpointError, ConfigError
from tinylab.runs.durable import disk_error

MAX_CONFIG_BYTES = 1_000_000
MAX_YAML_BYTES = 200_000
_FIELDS: dict[str, tuple[str, type, Any]] = {
    "vocab_size": ("vocab_size", int, None),
    "d_model": ("hidden_size", int, None),
    "d_ff": ("intermediate_size", int, None),
    "n_layer": ("num_hidden_layers", int, None),
    "n_head": ("num_attention_heads", int, None),
    "n_kv_head": ("num_key_value_heads", int, None),
    "seq_len": ("max_position_embeddings", int, 2048),
    "norm_eps": ("rms_norm_eps", float, 1e-6),
    "tie_embeddings": ("tie_word_embeddings", bool, False),
    "init_std": ("initializer_range", float, 0.02),
}
"""Our fields: transformers' name, type and default. Those without a default must be given, but for n_kv_head."""
_REQUIRED = tuple(name for ours, (name, _, default) in _FIELDS.items() if default is None and ours != "n_kv_head")
_READ = {*(name for name, _, _ in _FIELDS.values()), "head_dim", "rope_theta", "rope_scaling", "rope_parameters"}
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
_ORIGINAL = "original_max_position_embeddings"
_ROPE_READ = {*_ROPE_NEEDS["llama3"], "rope_theta", "rope_type", "type", _ORIGINAL}
"""All other keys of it may change the model."""


def config_values(config: Model) -> dict[str, Any]:
    """What config.json says of the model itself, under transformers' names."""
    scaling = config.rope_scaling
    rope = {"rope_type": scaling.rope_type, **scaling_values(scaling, _ORIGINAL)} if scaling else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: getattr(config, ours) for ours, (name, _, _) in _FIELDS.items()},
        "head_dim": config.head_size,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
    }


def scaling_values(scaling: RopeScaling, original: str) -> dict[str, float]:
    """The numbers of a rotary scaling; `original` is the format's name of the context before it."""
    values = {"factor": scaling.factor}
    if scaling.rope_type == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        values[original] = scaling.original_seq_len
    return values


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
    problems += misfits(values, _FIXED)
    unknown = {k: v for k, v in values.items() if k not in _READ | _HARMLESS | _FIXED.keys() and v not in (None, False)}
    problems += [f"{key} = {value!r} is unknown and may change the model" for key, value in unknown.items()]
    if values.get("model_type") is None:
        problems.append("model_type must be 'llama'; found none")
    if problems:
        raise CheckpointError(f"{where} must describe a Llama that tinylab computes exactly: {'; '.join(problems)}")
    try:
        return _model(values)
    except (ConfigError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{where} cannot be used: {error}") from error


def misfits(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """A line for each given key of `fixed` that has none of the values it must have (none allowed: null only)."""
    given = {key: values[key] for key in fixed if values.get(key) is not None and values[key] not in fixed[key]}
    return [
        f"{key} must be {' or '.join(map(repr, fixed[key])) or 'null'}; found {reprlib.repr(value)}"
        for key, value in given.items()
    ]


def take(values: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """`values[key]` as int, float or bool; `default` for absent and null. Raises ConfigError for another type."""
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        words = {int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(f"{key} must be {words[kind]}; found {reprlib.repr(value)}")
    return kind(value)


def _model(values: dict[str, Any]) -> Model:
    given = {"num_key_value_heads": values["num_attention_heads"]} | {k: v for k, v in values.items() if v is not None}
    fields = {ours: take(given, *theirs) for ours, theirs in _FIELDS.items()}
    fields["init_std"] = fields["init_std"] or 0.02
    size = take(given, "head_dim", int, fields["d_model"] // max(fields["n_head"], 1))
    theta, scaling = _rope(given, fields["seq_len"])
    d_head = None if size * fields["n_head"] == fields["d_model"] else size
    return Model(**fields, d_head=d_head, rope_theta=theta, rope_scaling=scaling, init="normal")


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
        rotates_all = key == "partial_rotary_factor" and value in _FIXED[key]
        if key not in _ROPE_READ and value is not None and not rotates_all:
            raise ConfigError(f"rope_scaling.{key} = {value!r} is unknown and may change the model")
    missing = [key for key in _ROPE_NEEDS[kind] if rope.get(key) is None]
    if missing:
        raise ConfigError(f"rope_scaling of type {kind} must give {', '.join(missing)}; found none")
    if kind == "default":
        return theta, None
    factors = {key: float(rope[key]) for key in _ROPE_NEEDS[kind]}
    original = {"original_seq_len": int(rope.get(_ORIGINAL) or seq_len)} if kind == "llama3" else {}
    return theta, RopeScaling(rope_type=kind, **factors, **original)


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
