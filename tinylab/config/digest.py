"""What of a configuration decides about a run's numbers: one digest, stored in every checkpoint.

A field added later must not make old checkpoints refuse, so a field at its default does not count. A default that
changes would change the meaning of stored digests: it needs a new version here.
"""

import dataclasses
import hashlib
import json
from dataclasses import replace
from typing import Any

from tinylab.config.architecture import Model, RopeScaling
from tinylab.config.faults import Faults
from tinylab.config.io import run_from_dict, run_to_dict, run_to_toml
from tinylab.config.schema import Data, Optimizer, Parallel, RunConfig, Saving, Source, Validation
from tinylab.config.stages import Schedule, Stage

DIGEST_VERSION = 2
"""Stored beside the digest; a checkpoint without one has version 1."""
_FIELDS_1 = {
    RunConfig: "preset seed model data stages schedule optimizer parallel saving validation",
    Model: "vocab_size n_layer d_model n_head n_kv_head d_ff d_head seq_len norm_eps rope_theta rope_scaling "
    "tie_embeddings init init_std",
    RopeScaling: "rope_type factor low_freq_factor high_freq_factor original_seq_len",
    Data: "sources path tokenizer vocab_size boundary validation_fraction document_mask seed",
    Source: "name corpus limit_mb",
    Stage: "name tokens batch_tokens mixture ramp_tokens lr lr_end",
    Schedule: "kind warmup_tokens end decay_fraction",
    Optimizer: "lr betas eps weight_decay decay clip_norm",
    Parallel: "device micro_batch precision compile threads strategy",
    Saving: "every_tokens early keep",
    Validation: "every_tokens sequences",
}
"""Every field that version 1 knew, in its order."""


def config_digest(config: RunConfig, version: int = DIGEST_VERSION) -> str:
    """SHA-256 of everything in the configuration but the layout of the work (`parallel`), the place of the data and
    what follows a step at fault or a checkpoint that could not be written.

    Version 2 hashes the fields that are not at their defaults. Version 1 hashed the TOML of all its fields; newer
    fields enter it only where they are not at their defaults, hence no digest of then equals such a configuration's.
    """
    saving = replace(config.saving, on_error=Saving().on_error)
    same = replace(config, parallel=Parallel(), data=replace(config.data, path=None), saving=saving, faults=Faults())
    if version == 1:
        text = run_to_toml(_fields_of_version_1(same))
    else:
        text = json.dumps(_changed_fields(run_from_dict(run_to_dict(same))), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _changed_fields(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if not _is_default(value, f)]
        return {name: _changed_fields(getattr(value, name)) for name in names}
    return [_changed_fields(v) for v in value] if isinstance(value, tuple) else value


def _fields_of_version_1(value: Any) -> Any:
    """Nested plain values of the fields that version 1 knew, and of newer ones that are not at their defaults."""
    if dataclasses.is_dataclass(value):
        names = _FIELDS_1.get(type(value), "").split()  # type: ignore[arg-type]
        names += [f.name for f in dataclasses.fields(value) if f.name not in names and not _is_default(value, f)]
        pairs = ((name, getattr(value, name)) for name in names)
        return {name: _fields_of_version_1(v) for name, v in pairs if v is not None}
    return [_fields_of_version_1(v) for v in value] if isinstance(value, tuple) else value


def _is_default(owner: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether the field of `owner` has its default; a field without a default never does."""
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    return getattr(owner, field.name) == default
