"""Profiles: the settings that two scores must share to be comparable.

The tokenizer, batch size, device and limit are not among them: TinyLlama and Pythia must be comparable.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata

from tinylab.errors import ConfigError, EvaluationError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How items are scored. Two results are comparable only if every field but the name is equal."""

    name: str
    """Name on the command line; not part of the hash."""
    add_bos: bool | None = False
    """Whether BOS goes before every prompt; None: as the checkpoint's own tokenizer does."""
    dtype: str = "fp32"
    """Precision of weights and activations."""
    num_fewshot: int = 0
    """Solved examples before each prompt."""
    accuracy: str = "acc_norm per character where the task has it, else acc"
    """The metric used for a benchmark in tables and in the mean."""
    empty_context: str = "document boundary"
    """What replaces an empty context (for mutual information): EOS if there is one, as in lm-eval's hf-causal."""
    lm_eval: str = ""
    """Version of lm-eval that built the prompts."""

    @property
    def hash(self) -> str:
        """SHA-256 over every field but the name."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()

    def fields(self) -> dict[str, object]:
        """The fields that must be equal for two results to be comparable."""
        return {name: value for name, value in asdict(self).items() if name != "name"}


def profile(name: str | Profile) -> Profile:
    """The profile of that name, bound to the installed lm-eval.

    `tinyllama-2023`: zero-shot, no BOS, fp32, as for EVAL.md (`main.py --model hf-causal` of v0.3.0).
    `current`: today's defaults of lm-eval, where a Llama tokenizer prepends BOS.
    Raises ConfigError for another name, EvaluationError when lm-eval is not installed.
    """
    if isinstance(name, Profile):
        return name
    version = lm_eval_version()
    known = {
        "tinyllama-2023": Profile(name="tinyllama-2023", lm_eval=version),
        "current": Profile(name="current", add_bos=None, lm_eval=version),
    }
    if name not in known:
        hint = did_you_mean(name, known, "choose one of them")
        raise ConfigError(f"profile must be one of {', '.join(known)}; found {name!r}; {hint}")
    return known[name]


def lm_eval_version() -> str:
    """Version of the installed lm-eval. Raises EvaluationError with the command that installs it."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise EvaluationError(
            "evaluation needs lm-eval; found none installed. Install it: pip install 'tinylab[evaluate]'"
        ) from None
