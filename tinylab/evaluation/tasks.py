"""lm-eval's multiple-choice tasks over local files, in memory: no scan of all tasks, no cache, no network.

Prompts, answers and metrics are those of lm-eval's built-in YAML files; only the source of the documents differs.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylab.errors import ConfigError, EvaluationError, did_you_mean
from tinylab.evaluation.probes import PROBES, probe_config, word_overlap
from tinylab.evaluation.published import BENCHMARKS

GROUPS = {"probes": ("continuation", "code"), "benchmarks": tuple(BENCHMARKS)}
"""The probe `docstring` is in no group, because models of a few million parameters stay near chance on it."""


@dataclass(frozen=True)
class EvaluationTask:
    """A task that is ready to run, and what the store keeps about it."""

    name: str
    task: Any
    """lm-eval's ConfigurableTask."""
    version: str
    metric: str
    """The accuracy used for the task in tables."""
    chance: float
    source: str
    """Where the documents came from; for a file its name without the folder."""
    baseline: float | None = None
    """Accuracy of a rule without a model: BoolQ's most frequent answer; a probe's choice with most shared words."""


def expand(names: str | Sequence[str]) -> list[str]:
    """Task names, each once, with the groups `probes` and `benchmarks` replaced by their members.

    Raises ConfigError for an unknown name, with the nearest known one.
    """
    known = [*GROUPS, *PROBES, *BENCHMARKS]
    result: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            hint = did_you_mean(name, known, "choose one of them")
            raise ConfigError(f"tasks must be among {', '.join(known)}; found {name!r}; {hint}")
        result += [n for n in GROUPS.get(name, (name,)) if n not in result]
    if not result:
        raise ConfigError(f"tasks must name at least one of {', '.join(known)}; found none")
    return result


def benchmark(name: str, data_dir: str | Path | None) -> EvaluationTask:
    """One of the seven benchmarks: from `data_dir/<name>.jsonl` if given, else from the Hub through lm-eval.

    Raises EvaluationError with the file or line that cannot be used.
    """
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    about = BENCHMARKS[name]
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / about.file)
    source = f"hub:{config['dataset_path']}"
    if data_dir is not None:
        path = Path(data_dir).expanduser() / f"{name}.jsonl"
        documents = _read_documents(path)
        source = f"file:{path.name}"
        config = _in_memory(config, documents, about.split)
    return _build(name, config, about.metric, about.chance, source, about.majority)


def probe(name: str, items: list[dict[str, Any]], source: str) -> EvaluationTask:
    """A probe's items (evaluation/probes.py) as an lm-eval task."""
    config = _in_memory(probe_config(name), items, "validation")
    return _build(name, config, "acc_mutual_info", 1 / len(items[0]["choices"]), source, word_overlap(items))


def _in_memory(config: dict[str, Any], documents: list[dict[str, Any]], split: str) -> dict[str, Any]:
    import datasets

    data = {split: datasets.Dataset.from_list(documents)}
    splits = {f"{s}_split": (s if s == split else None) for s in ("training", "validation", "test")}
    return config | splits | {"dataset_kwargs": None, "custom_dataset": lambda **_: data}


def _build(
    name: str, config: dict[str, Any], metric: str, chance: float, source: str, baseline: float | None
) -> EvaluationTask:
    from lm_eval.api.task import ConfigurableTask

    config = {k: v for k, v in config.items() if k != "tag"} | {"task": name}
    with quiet_lm_eval():
        try:
            task = ConfigurableTask(config=config)
        except (OSError, ConnectionError) as error:
            raise EvaluationError(
                f"the documents of {name} must be reachable; {source} is not: {error}. Use local files: --data-dir"
            ) from error
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise EvaluationError(
                f"the documents of {name} ({source}) must have the fields that lm-eval's task reads; "
                f"found {type(error).__name__}: {error}"
            ) from error
    version = str((config.get("metadata") or {}).get("version", 0))
    return EvaluationTask(name, task, version, metric, chance, source, baseline)


def _read_documents(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read {path}: {error}. --data-dir must hold {path.name}") from error
    documents = []
    for number, line in enumerate(lines, start=1):
        try:
            document = json.loads(line)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise EvaluationError(f"{path}, line {number} must be a JSON object; found {line[:60]!r}")
        documents.append(document)
    if not documents:
        raise EvaluationError(f"{path} must hold at least one document; it is empty")
    return documents


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Switches lm-eval's log lines and progress bars off, and restores them afterwards."""
    import lm_eval.api.task as building
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, bars = logging.getLogger("lm_eval"), not are_progress_bars_disabled()
    before, bar = logger.level, building.tqdm
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    setattr(building, "tqdm", lambda documents, **_: documents)  # noqa: B010 - it has no switch of its own
    try:
        yield
    finally:
        logger.setLevel(before)
        setattr(building, "tqdm", bar)  # noqa: B010
        if bars:
            enable_progress_bars()
