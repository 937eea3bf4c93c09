"""What the benchmarks share: the shape, one model opened by both libraries, measurements in turn, the conditions."""

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from tinylab.config.architecture import Model
from tinylab.config.presets import preset as find_preset
from tinylab.errors import ConfigError
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.formats.load import load_folder
from tinylab.model.transformer import Llama

T = TypeVar("T")


def shape_of(preset: str | Model, windows: int) -> Model:
    """The shape to measure. Raises ConfigError for an unknown preset, and for no windows."""
    if windows < 1:
        raise ConfigError(f"windows must be at least 1; found {windows}")
    return find_preset(preset).model if isinstance(preset, str) else preset


def open_in_both(model: Llama, **settings: Any) -> tuple[Llama, Any]:
    """The model, written as a Hugging Face folder and opened by both libraries in fp32; no token ends a text.

    `settings` are from_pretrained's.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="tinylab-bench-") as folder:
        save_weights(model.state_dict(), model.config, folder)
        write_config(model.config, folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs: Any = load(folder, dtype=torch.float32, **settings).eval()
        ours = load_folder(folder)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return ours, theirs


def in_turn(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each contender's measurement returned in every round."""
    found: dict[str, list[T]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            found[name].append(measure())
    return found


def conditions() -> dict[str, Any]:
    """What of this process and machine decides a speed."""
    return {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0], "torch": torch.__version__}
