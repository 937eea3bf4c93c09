"""A tiny run on tiny corpora, and children that can be killed while they train it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tinylab.config.architecture import Model
from tinylab.config.io import run_to_toml
from tinylab.config.schema import Data, Optimizer, Parallel, RunConfig, Saving, Source, Validation
from tinylab.config.stages import Schedule, Stage
from tinylab.runs.folder import Run

STEPS = 24


@dataclass
class Ended:
    """How a child ended."""

    code: int
    stderr: str
    seconds: float


class Trainer:
    """Trains in children that share one home folder, hence one prepared data set."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config, self.home = folder, config, folder / "home"
        command = [sys.executable, str(Path(__file__).with_name("driver.py"))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TINYLAB_HOME": str(self.home)}
        self._driver = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._configs = 0

    def go(self, run: Path, config: RunConfig | None = None, failpoint: str = "", **request: Any) -> Ended:
        """Train `config` in folder `run`: `ranks=n`, `kill=(signal, seconds[, rank])`, `kill_in_save=(n, seconds after
        the folder of the n-th save of these processes appeared)`, `signal_at=(step, signal)`, `file_bytes=n`."""
        self._configs += 1
        toml = self.folder / f"config{self._configs}.toml"
        toml.write_text(run_to_toml(config or self.config))
        env = {"TINYLAB_FAILPOINT": failpoint, "TINYLAB_HOME": str(request.pop("home", self.home))}
        env |= request.pop("env", {})
        assert self._driver.stdin and self._driver.stdout
        self._driver.stdin.write(json.dumps({"run": str(run), "config": str(toml), "env": env, **request}) + "\n")
        self._driver.stdin.flush()
        return Ended(**json.loads(self._driver.stdout.readline()))

    def close(self) -> None:
        assert self._driver.stdin and self._driver.stdout
        self._driver.stdin.close()
        self._driver.wait(timeout=10)
        self._driver.stdout.close()


def write_corpus(path: Path, seed: int, documents: int = 300) -> None:
    """Documents of random words from a small vocabulary, one JSON object a line."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnop"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 6))) for _ in range(60)]
    lines = [{"text": " ".join(generator.choices(words, k=generator.randint(8, 40)))} for _ in range(documents)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """24 steps of 256 tokens in two stages; checkpoints at 1 2 4, 5 10 15 20, 12 24; validation at 1, 4, 8 …"""
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("prose", "code")):
        write_corpus(folder / f"{name}.jsonl", seed)
    sources = tuple(Source(name=n, corpus=f"files:{folder}/{n}.jsonl") for n in ("prose", "code"))
    return RunConfig(
        preset="test",
        seed=11,
        model=Model(vocab_size=300, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=64, seq_len=32),
        data=Data(sources=sources, vocab_size=300, validation_fraction=0.1),
        stages=(
            Stage(name="basic", tokens=12 * 256, batch_tokens=256, mixture={"prose": 0.7, "code": 0.3}),
            Stage(name="cooldown", tokens=12 * 256, batch_tokens=256, mixture={"prose": 0.5, "code": 0.5}),
        ),
        schedule=Schedule(warmup_tokens=1024),
        optimizer=Optimizer(lr=1e-2, clip_norm=1.0),
        parallel=Parallel(device="cpu", micro_batch=4, precision="fp32", threads=1),
        saving=Saving(every_tokens=5 * 256),
        validation=Validation(every_tokens=1024, sequences=8),
    )


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory, tiny_config: RunConfig) -> Iterator[Trainer]:
    found = Trainer(tmp_path_factory.mktemp("trainer"), tiny_config)
    yield found
    found.close()


@pytest.fixture(scope="session")
def pruned_config(tiny_config: RunConfig) -> RunConfig:
    """The tiny run with retention: 5 and 10 are gone at the end."""
    return replace(tiny_config, saving=replace(tiny_config.saving, keep=2))


@pytest.fixture(scope="session")
def reference(trainer: Trainer) -> Run:
    """The undisturbed tiny run."""
    run = Run(trainer.folder / "reference")
    ended = trainer.go(run.path)
    assert ended.code == 0, ended.stderr
    return run


@pytest.fixture(scope="session")
def pruned_reference(trainer: Trainer, reference: Run, pruned_config: RunConfig) -> Run:
    """The undisturbed tiny run with retention."""
    run = Run(trainer.folder / "pruned")
    ended = trainer.go(run.path, pruned_config)
    assert ended.code == 0, ended.stderr
    return run


@pytest.fixture(scope="session")
def assert_nothing_lost() -> Any:
    """The check of "nothing lost" between an undisturbed run and one that was disturbed and started again."""
    return _assert_nothing_lost


@pytest.fixture(scope="session")
def assert_same_end() -> Any:
    """The check that a run that was stopped on the way, where it commits, ends as one that was not."""
    return _assert_same_end


def _assert_same_end(expected: Run, found: Run) -> None:
    wanted, records = expected.metric_records(), found.metric_records()
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "stage", "data_hash", "validation_loss", "bits_per_byte")
    assert [_row(r, keys) for r in records] == [_row(r, keys) for r in wanted]
    assert _digests(found.checkpoints()[-1]) == _digests(expected.checkpoints()[-1])
    assert not list(found.checkpoints_path.glob(".*")) and not list(found.path.glob(".*.tmp"))
    assert found.status()["state"] == "done" and found.journal()[-1]["event"] == "done"


def _assert_nothing_lost(expected: Run, found: Run) -> None:
    _assert_same_end(expected, found)
    assert [p.name for p in found.checkpoints()] == [p.name for p in expected.checkpoints()]
    for ours, theirs in zip(found.checkpoints(), expected.checkpoints(), strict=True):
        assert _digests(ours) == _digests(theirs)
    assert {p.name for p in found.checkpoints_path.iterdir()} == {p.name for p in found.checkpoints()}
    journal = found.journal()
    committed = 0
    for line in journal:
        if line["event"] == "committed":
            committed = line["step"]
        elif line["event"] == "resumed":
            assert line["step"] >= committed
    lines = [line["step"] for line in journal if line["event"] == "committed"]
    assert set(lines) == {line["step"] for line in expected.journal() if line["event"] == "committed"}


def _row(record: dict[str, Any], keys: tuple[str, ...]) -> list[Any]:
    values = [record.get(k) for k in keys]
    return [v.hex() if isinstance(v, float) else v for v in values]


def _digests(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("trainer.json", "manifest.json")]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
