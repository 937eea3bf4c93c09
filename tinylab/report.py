"""One HTML file about runs that opens offline: every text escaped, every figure inside, nothing loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinylab import plots
from tinylab.config.counts import format_count
from tinylab.config.io import run_to_toml
from tinylab.errors import ConfigError, TinylabError
from tinylab.html.escape import escape, table_html
from tinylab.html.parts import figure_html
from tinylab.runs.durable import disk_error, write_atomic
from tinylab.runs.folder import Run

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{margin-top:2.4rem;border-bottom:2px solid #0072B2;padding-bottom:.2rem}
table{border-collapse:collapse;margin:.8rem 0;font-size:.88rem}caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{border-bottom:1px solid #ddd;padding:.25rem .7rem;text-align:left;vertical-align:top}
th{background:#f4f6f8}
pre{background:#f7f7f7;padding:.8rem;overflow:auto;font-size:.82rem}
figure{margin:1.2rem 0}figcaption{color:#666;font-size:.85rem}.note{color:#666}nav a{margin-right:1rem}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(runs: Sequence[Run | str | Path], out: str | Path, *, title: str = "") -> Path:
    """Write one HTML file about `runs` to `out`, whole or not at all; its absolute path.

    Sections: summary, loss, schedule and speed, scores, comparison of checkpoints, data, configuration, journal.
    Raises NothingFoundError for a run that is not there, ConfigError for no runs or an `out` that is a folder.
    """
    import pandas

    found = [(run if isinstance(run, Run) else Run(run)).require() for run in runs]
    out = Path(out).expanduser().absolute()
    if not found or out.is_dir():
        raise ConfigError(f"a report needs at least one run, and a file to write; found {len(found)} runs and {out}")
    name = title or f"Report on {', '.join(run.name for run in found)}"
    sections = {
        "Summary": _summary(found, pandas),
        "Loss": _loss(found),
        "Learning rate, gradients, speed": _training(found),
        "Scores": "".join(_scores(run) for run in found),
        "Comparison of checkpoints": "".join(_comparison(run) for run in found),
        "Data": "".join(_data(run, pandas) for run in found),
        "Configuration": "".join(f"<h3>{escape(r.name)}</h3><pre>{escape(run_to_toml(r.config))}</pre>" for r in found),
        "Provenance and journal": "".join(_provenance(run, pandas) for run in found),
    }
    links = "".join(f'<a href="#s{i}">{escape(heading)}</a>' for i, heading in enumerate(sections))
    body = "".join(f'<h2 id="s{i}">{escape(h)}</h2>{content}' for i, (h, content) in enumerate(sections.items()))
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    html = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(name)}</h1>"
        f'<p class="note">Written by tinylab on {made}. Everything is in this file.</p>'
        f"<nav>{links}</nav>{body}</body></html>\n"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out, error) from error
    write_atomic(out, html)
    return out


def _figure(figure: plots.LabFigure, caption: str) -> str:
    return f"<figure>{figure_html(figure, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _summary(runs: list[Run], pandas: Any) -> str:
    """One row per run, and one sentence on what happened."""
    rows, sentences = [], []
    for run in runs:
        records, config, state = run.metric_records(), run.config, run.status().get("state")
        measured = [r["validation_loss"] for r in records if r.get("validation_loss") is not None]
        bits = [r["bits_per_byte"] for r in records if r.get("bits_per_byte") is not None]
        seconds = sum(r["step_time_s"] for r in records)
        speeds = sorted(r["tokens_per_s"] for r in records[1:])
        rows.append(
            {
                "run": run.name,
                "preset": config.preset,
                "state": state,
                "steps": f"{records[-1]['step'] if records else 0:,} of {config.steps:,}",
                "tokens": records[-1]["tokens"] if records else 0,
                "training loss (nats)": records[-1]["loss"] if records else None,
                "validation loss (nats)": measured[-1] if measured else None,
                "bits per byte": bits[-1] if bits else None,
                "tokens/s (median)": round(speeds[len(speeds) // 2]) if speeds else None,
                "time in steps (s)": round(seconds),
                "checkpoints": len(run.checkpoints()),
            }
        )
        if len(measured) > 1:
            sentences.append(
                f"{run.name}: validation loss went from {measured[0]:.2f} to {measured[-1]:.2f} nats per token "
                f"over {format_count(records[-1]['tokens'])} tokens."
            )
    return f"<p>{escape(' '.join(sentences))}</p>" + table_html(pandas.DataFrame(rows), "Runs")


def _loss(runs: list[Run]) -> str:
    names = ", ".join(run.name for run in runs)
    return _figure(plots.loss_curves(runs), f"Training and validation loss over tokens: {names}.") + _figure(
        plots.validation_bits(runs), f"Bits per byte of held-out text over tokens: {names}."
    )


def _training(runs: list[Run]) -> str:
    parts = [
        _figure(plots.learning_rate(run.config), f"Learning rate over tokens, as {run.name} is configured.")
        for run in runs
    ]
    parts.append(_figure(plots.gradient_norm(runs), "Gradient norm before clipping over tokens."))
    parts.append(_figure(plots.throughput(runs), "Tokens per second and peak memory over tokens."))
    return "".join(parts)


def _scores(run: Run) -> str:
    """Trajectories of every task in the run's store beside the published ones, and the table of first and last."""
    from tinylab.evaluation.published import published
    from tinylab.evaluation.records import Scores

    try:
        table = Scores(run.evaluations_path).table()
    except TinylabError as error:
        return f'<h3>{escape(run.name)}</h3><p class="note">{escape(error)}</p>'
    figure = plots.score_trajectories(table, published())
    caption = f"Scores of {run.name} (top) and published scores of TinyLlama and Pythia-1.0B (below), over tokens."
    shown: Any = table[["label", "tokens", "task", "metric", "value", "low", "high", "n", "chance", "baseline"]]
    return f"<h3>{escape(run.name)}</h3>" + _figure(figure, caption) + table_html(shown, "Every measurement", digits=3)


def _comparison(run: Run) -> str:
    """The middle and the last scored checkpoint of the run, item by item."""
    from tinylab.widgets.view import compare_scores, scored_pair

    pair = scored_pair(run)
    if pair is None:
        return f'<h3>{escape(run.name)}</h3><p class="note">Fewer than two checkpoints are scored.</p>'
    try:
        scores = compare_scores(*pair)
    except TinylabError as error:
        return f'<h3>{escape(run.name)}</h3><p class="note">{escape(error)}</p>'
    a, b, table = scores.a["label"], scores.b["label"], scores.table()
    return (
        f"<h3>{escape(a)} and {escape(b)}</h3>"
        + _figure(
            plots.score_differences(table, a, b),
            f"Score of {b} minus score of {a}, per task, with 95% intervals.",
        )
        + _figure(plots.flips(table, a, b), f"Items that changed side from {a} to {b}, per task.")
        + table_html(table, "Paired comparison; difference, low and high are fractions", digits=3)
    )


def _data(run: Run, pandas: Any) -> str:
    """Mixture over the run, and what the prepared data hold according to their manifest."""
    from tinylab.data.trace import stored_shards

    config = run.config
    parts = [
        f"<h3>{escape(run.name)}</h3>",
        _figure(plots.mixture_of(config), f"Mixture of sources over tokens in {run.name}."),
    ]
    sources = pandas.DataFrame(
        [{"source": s.name, "corpus": s.corpus, "limit (MB)": s.limit_mb} for s in config.data.sources]
    )
    parts.append(table_html(sources, "Sources"))
    try:
        manifest = stored_shards(run).manifest
    except TinylabError as error:
        return "".join([*parts, f'<p class="note">{escape(error)}</p>'])
    rows = [
        {"split": split, "source": source, "documents": e["documents"], "tokens": e["tokens"], "bytes": e["bytes"]}
        for split, entries in manifest["splits"].items()
        for source, e in entries.items()
    ]
    parts.append(table_html(pandas.DataFrame(rows), f"Prepared data, fingerprint {manifest['fingerprint'][:16]}…"))
    parts.append(table_html(_pairs(manifest["tokenizer"], pandas), "Tokenizer"))
    parts.append(table_html(_pairs(manifest.get("report", {}), pandas), "Report of the preparation"))
    return "".join(parts)


def _provenance(run: Run, pandas: Any) -> str:
    try:
        provenance = json.loads(run.provenance_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        provenance = {"provenance.json": "missing or unreadable"}
    lines = [
        {
            "event": e.get("event"),
            "time (UTC)": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(e.get("time", 0))),
            "step": e.get("step"),
            "tokens": e.get("tokens"),
        }
        for e in run.journal()
    ]
    return (
        f"<h3>{escape(run.name)}</h3>"
        + table_html(_pairs(provenance, pandas), "Provenance")
        + (table_html(pandas.DataFrame(lines), "Journal") if lines else "")
    )


def _pairs(values: dict[str, Any], pandas: Any) -> Any:
    """A dictionary as a two-column table; nested values as JSON."""
    texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values.values()]
    return pandas.DataFrame({"key": list(values), "value": texts})
