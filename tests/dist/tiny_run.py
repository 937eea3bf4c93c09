"""A run of a few milliseconds a step, for tests that start it in processes of its own."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from tinylab.config.architecture import Model
from tinylab.config.schema import Data, Optimizer, Parallel, RunConfig, Saving, Source, Validation
from tinylab.config.stages import Schedule, Stage


def tiny_config(folder: Path, steps: int) -> RunConfig:
    """A run of `steps` steps of 256 tokens on a corpus of random words in `folder`; saves at its end only."""
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 6))) for _ in range(60)]
    lines = [{"text": " ".join(generator.choices(words, k=generator.randint(8, 40)))} for _ in range(300)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunConfig(
        preset="test",
        model=Model(vocab_size=300, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=64, seq_len=32),
        data=Data(
            sources=(Source(name="words", corpus=f"files:{folder}/words.jsonl"),),
            path=str(folder / "prepared"),
            vocab_size=300,
            validation_fraction=0.1,
        ),
        stages=(Stage(name="only", tokens=steps * 256, batch_tokens=256),),
        schedule=Schedule(warmup_tokens=256),
        optimizer=Optimizer(lr=1e-3),
        parallel=Parallel(device="cpu", precision="fp32", threads=1),
        saving=Saving(early=False),
        validation=Validation(sequences=8),
    )


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
