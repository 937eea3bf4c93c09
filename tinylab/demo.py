"""`tinylab demo`: everything once on one machine, offline; finished parts are not repeated.

text of this Python environment → tokenizer, shards → two-stage run → scores → executed notebooks → report.html
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinylab.config import presets
from tinylab.config.schema import RunConfig
from tinylab.errors import ConfigError
from tinylab.runs.durable import write_atomic
from tinylab.runs.folder import Run

NOTEBOOKS = (
    "00_doctor_and_tour",
    "01_data_and_tokens",
    "02_pretrain",
    "03_loss_curves",
    "05_score_trajectories",
    "06_compare_checkpoints",
    "10_report",
)


def demo(run: str | Path = "demo", tokens: int | None = None, again: bool = False) -> dict[str, Any]:
    """Run the demo in the run folder `run`, or what is left of it.

    `tokens`: length of the run (default: preset demo). `again`: execute the notebooks even if nothing changed.
    Returns `parts` (part, seconds, what), `results` and `look` (what to open). Raises ConfigError if the folder
    contains another run.
    """
    folder, config = Run(run), presets.preset("demo", tokens)
    if folder.exists() and folder.config != config:
        raise ConfigError(
            f"{folder.path} must have the demo's own configuration; found another (--tokens, or another version). "
            "Choose another folder (tinylab demo --run NAME) or remove this one"
        )
    parts: list[dict[str, Any]] = []

    def part(name: str, work: Callable[[], str]) -> None:
        _say(f"{name} …")
        start = time.perf_counter()
        what = work()
        parts.append({"part": name, "seconds": round(time.perf_counter() - start, 1), "what": what})
        _say(f"{name}: {what} ({parts[-1]['seconds']} s)")

    part("data", lambda: _prepare(config))
    part("training", lambda: _train(config, folder))
    part("scores", lambda: _evaluate(folder))
    part("notebooks", lambda: _execute(folder, again))
    part("report", lambda: _report(folder))
    places = {"report": "report.html", "notebooks": "notebooks", "checkpoints": "checkpoints"}
    look = {name: str(folder.path / place) for name, place in places.items()}
    return {"run": str(folder.path), "parts": parts, "results": _results(folder), "look": look}


def _say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr, flush=True)


def _prepare(config: RunConfig) -> str:
    from tinylab.data.prepare import prepare

    shards = prepare(config.data)
    tokens = sum(source["tokens"] for source in shards.manifest["splits"]["train"].values())
    return f"{tokens:,} training tokens in {shards.path}"


def _train(config: RunConfig, run: Run) -> str:
    from tinylab.training.loop import train

    train(config, run)
    losses = _validation_losses(run)
    return f"{config.steps} steps, {config.tokens:,} tokens; validation loss {losses[0]:.2f} → {losses[-1]:.2f} nats"


def _validation_losses(run: Run) -> list[float]:
    return [r["validation_loss"] for r in run.metric_records() if r.get("validation_loss") is not None]


def _evaluate(run: Run) -> str:
    from tinylab.evaluation.evaluate import evaluate

    records = evaluate(run.path, all_checkpoints=True)
    return f"{len(records)} measurements of {len(run.checkpoints())} checkpoints in {run.evaluations_path}"


def _execute(run: Run, again: bool) -> str:
    from tinylab.notebook.run import find_notebook, notebook_parameters, run_notebook

    target, state = run.path / "notebooks", run.path / "notebooks" / "executed.json"
    done = json.loads(state.read_text(encoding="utf-8")) if state.is_file() and not again else {}
    executed = 0
    for name in NOTEBOOKS:
        source = find_notebook(name)
        known = notebook_parameters(source)
        values = {k: v for k, v in _parameters(run).items() if k in known}
        key = _state_key(run, source, values)
        if done.get(name) == key and (target / f"{name}.ipynb").is_file():
            continue
        start = time.perf_counter()
        run_notebook(source, target / f"{name}.ipynb", values)
        done[name], executed = key, executed + 1
        write_atomic(state, json.dumps(done, indent=1))
        _say(f"  {name} ({time.perf_counter() - start:.1f} s)")
    return f"{executed} executed, {len(NOTEBOOKS) - executed} unchanged, in {target}"


def _parameters(run: Run) -> dict[str, Any]:
    checkpoints = run.checkpoints()
    return {
        "run": str(run.path),
        "runs": [str(run.path)],
        "store": str(run.evaluations_path),
        "a": str(checkpoints[len(checkpoints) // 2]),
        "b": str(checkpoints[-1]),
        "preset": "demo",
        "title": "tinylab demo",
    }


def _state_key(run: Run, notebook: Path, values: dict[str, Any]) -> str:
    """Hash of everything that an executed notebook depends on: source, parameters, steps and scores of the run."""
    scores = sorted(p.name for p in run.evaluations_path.rglob("*.jsonl"))
    rest = [run.metric_records()[-1], [p.name for p in run.checkpoints()], scores, values]
    return hashlib.sha256(notebook.read_bytes() + json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _report(run: Run) -> str:
    from tinylab.report import write_report

    out = run.path / "report.html"
    write_report([run], out)
    return f"{out}, {out.stat().st_size / 1e6:.1f} MB"


def _results(run: Run) -> dict[str, Any]:
    """Validation loss and every probe at the first and the last checkpoint, with 95% intervals, chance and baseline."""
    from tinylab.evaluation.scores import Scores

    losses = _validation_losses(run)
    rows = [r for r in Scores(run.evaluations_path).rows() if r["step"] is not None]
    probes = {}
    for task in sorted({r["task"] for r in rows}):
        of_task = sorted((r for r in rows if r["task"] == task), key=lambda r: r["step"])
        keep = ("step", "metric", "value", "low", "high", "n", "chance", "baseline")
        probes[task] = {"first": {k: of_task[0][k] for k in keep}, "last": {k: of_task[-1][k] for k in keep}}
    return {"validation_loss": {"first": losses[0], "last": losses[-1]}, "probes": probes}
