"""A small lab: prepared data with prose and code, and a run with two checkpoints of random weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinylab.config.architecture import Model
from tinylab.config.schema import Data, RunConfig, Saving, Source, Validation
from tinylab.config.stages import Schedule, Stage

WORDS = [
    a + b + c
    for a in ("", "re", "un", "mis")
    for b in ("walk", "tall", "mind", "rock", "leaf")
    for c in ("s", "er", "ing", "ed", "")
]


def _prose(rng: random.Random) -> str:
    """Sentences over a few words of its own, so that a document is recognisable."""
    own = rng.sample(WORDS, 12)
    return " ".join(" ".join(rng.choices(own, k=9)).capitalize() + "." for _ in range(60))


def _code(rng: random.Random) -> str:
    parts = []
    for _ in range(6):
        name, words = "_".join(rng.sample(WORDS, 2)), " ".join(rng.sample(WORDS, 9))
        parts.append(f'def {name}(a, b):\n    """{words}."""\n    c = a + b\n    return {name!r} * c\n')
    return "\n\n".join(parts)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """`data` (prepared folder), `run` (a Run), `checkpoints` (two folders with different weights), `config`."""
    from tinylab.checkpoint.snapshot import Snapshot
    from tinylab.checkpoint.store import commit_checkpoint
    from tinylab.data.prepare import prepare
    from tinylab.model.transformer import Llama
    from tinylab.runs.folder import Run

    root: Path = tmp_path_factory.mktemp("lab")
    rng = random.Random(0)
    for kind, make, count, ending in (("prose", _prose, 80, "txt"), ("code", _code, 60, "py")):
        (root / kind).mkdir()
        for i in range(count):
            (root / kind / f"{i:03}.{ending}").write_text(make(rng))
    data = Data(
        sources=(
            Source(name="prose", corpus=f"files:{root}/prose/*.txt"),
            Source(name="code", corpus=f"files:{root}/code/*.py"),
        ),
        vocab_size=400,
        validation_fraction=0.3,
        path=str(root / "data"),
    )
    config = RunConfig(
        model=Model(vocab_size=400, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=64, seq_len=256),
        data=data,
        stages=(
            Stage(name="basic", tokens=4096, batch_tokens=512),
            Stage(name="cooldown", tokens=2048, batch_tokens=1024),
        ),
        schedule=Schedule(warmup_tokens=512),
        saving=Saving(every_tokens=512),
        validation=Validation(every_tokens=512),
    )
    shards = prepare(data, progress=lambda _: None)
    run = Run(root / "runs" / "small")
    run.create(config, {})
    checkpoints = []
    for step in (4, 9):
        model = Llama(config.model)
        model.init_weights(step)
        record = {
            "step": step,
            "tokens": config.tokens_at(step),
            "tokenizer_hash": shards.manifest["tokenizer"]["hash"],
        }
        record |= {"boundary": "eos"}
        snapshot = Snapshot(weights=model.state_dict(), optimizer={}, rng={}, record=record)
        checkpoints.append(commit_checkpoint(run, snapshot, config.model, shards))
    yield SimpleNamespace(root=root, data=root / "data", shards=shards, run=run, checkpoints=checkpoints, config=config)
