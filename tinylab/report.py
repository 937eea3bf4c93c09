"""One HTML file about runs that opens offline: every text escaped, every figure inside, nothing loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinylab.config.counts import format_count
from tinylab.config.io import run_to_toml
from tinylab.errors import CheckpointError, ConfigError, TinylabError
from tinylab.html.page import page_html
from tinylab.html.parts import captioned, code, heading, paragraph
from tinylab.html.tables import table_html
from tinylab.plots.comparison import flips, score_differences
from tinylab.plots.corpus import mixture_of
from tinylab.plots.scores import score_trajectories
from tinylab.plots.training import gradient_norm, learning_rate, loss_curves, throughput, validation_bits
from tinylab.runs.durable import disk_error, write_atomic
from tinylab.runs.effective_time import effective_time
from tinylab.runs.folder import Run
from tinylab.runs.regular import read_json


def write_report(runs: Sequence[Run | str | Path], out: str | Path, *, title: str = "") -> Path:
    """Write one HTML file about `runs` to `out`, complete or not at all; its absolute path.

    Sections: summary, loss, schedule and speed, scores, comparison of checkpoints, data, configuration, journal.
    Raises NothingFoundError for a run that is not there, ConfigError for no runs or an `out` that is a folder.
    """
    found = [(run if isinstance(run, Run) else Run(run)).require() for run in runs]
    out = Path(out).expanduser().absolute()
    if not found or out.is_dir():
        raise ConfigError(f"a report needs at least one run and a file to write; found {len(found)} runs and {out}")
    names = ", ".join(run.name for run in found)
    rates = ((learning_rate(r.config), f"Learning rate over tokens, as {r.name} is configured.") for r in found)
    sections = {
        "Summary": _summary(found),
        "Loss": captioned(loss_curves(found), f"Training and validation loss over tokens: {names}.")
        + captioned(validation_bits(found), f"Bits per byte of held-out text over tokens: {names}."),
        "Learning rate, gradients, speed": "".join(captioned(figure, caption) for figure, caption in rates)
        + captioned(gradient_norm(found), "Gradient norm before clipping over tokens.")
        + captioned(throughput(found), "Tokens per second and peak memory over tokens."),
        "Scores": "".join(heading(run.name) + _scores(run) for run in found),
        "Comparison of checkpoints": "".join(heading(run.name) + _comparison(run) for run in found),
        "Data": "".join(heading(run.name) + _data(run) for run in found),
        "Configuration": "".join(heading(run.name) + code(run_to_toml(run.config)) for run in found),
        "Provenance and journal": "".join(heading(run.name) + _provenance(run) for run in found),
    }
    note = f"Written by tinylab on {_utc(time.time())} UTC. Everything is in this file."
    html = page_html(title or f"Report on {names}", note, sections)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out, error) from error
    write_atomic(out, html)
    return out


def _summary(runs: list[Run]) -> str:
    """One row per run, and one sentence on what happened."""
    rows, times, sentences = [], [], []
    for run in runs:
        records, config = run.metric_records(), run.config
        last = {"step": 0, "tokens": 0, **(records[-1] if records else {})}
        measured = [r for r in records if r.get("validation_loss") is not None]
        newest = measured[-1] if measured else {}
        speeds = sorted(r["tokens_per_s"] for r in records[1:] if r.get("tokens_per_s"))
        spent = effective_time(run.journal(), records)
        times.append({"run": run.name, **{part: round(seconds, 1) for part, seconds in spent.parts.items()}})
        rows.append(
            {
                "run": run.name,
                "preset": config.preset,
                "state": run.status().get("state"),
                "steps": f"{last['step']:,} of {config.steps:,}",
                "tokens": last["tokens"],
                "training loss (nats)": last.get("loss"),
                "validation loss (nats)": newest.get("validation_loss"),
                "bits per byte": newest.get("bits_per_byte"),
                "tokens/s (median)": round(speeds[len(speeds) // 2]) if speeds else None,
                "time (s)": round(spent.wall_s),
                "effective training time": "n/a" if spent.ratio is None else f"{spent.ratio:.1%}",
                "checkpoints": len(run.checkpoints()),
            }
        )
        if len(measured) > 1:
            sentences.append(
                f"{run.name}: validation loss went from {measured[0]['validation_loss']:.2f} to "
                f"{newest['validation_loss']:.2f} nats per token over {format_count(last['tokens'])} tokens."
            )
    title = "Seconds by cause; effective training time is the share of the steps that the run kept"
    return paragraph(" ".join(sentences)) + table_html(rows, "Runs") + table_html(times, title)


def _scores(run: Run) -> str:
    """Trajectories of every task in the run's store above the published ones, and a table of all measurements."""
    from tinylab.evaluation.published import published
    from tinylab.evaluation.scores import Scores

    try:
        table = Scores(run.evaluations_path).table()
    except TinylabError as error:
        return paragraph(error, note=True)
    caption = f"Scores of {run.name} (top) and published scores of TinyLlama and Pythia-1.0B (below), over tokens."
    shown: Any = table[["label", "tokens", "task", "metric", "value", "low", "high", "n", "chance", "baseline"]]
    figure = score_trajectories(table, published())
    return captioned(figure, caption) + table_html(shown, "Every measurement", digits=3)


def _comparison(run: Run) -> str:
    from tinylab.analysis.pair import compare_scores, scored_pair

    pair = scored_pair(run)
    if pair is None:
        return paragraph("Fewer than two checkpoints are scored.", note=True)
    try:
        scores = compare_scores(*pair)
    except TinylabError as error:
        return paragraph(error, note=True)
    a, b, table = scores.a["label"], scores.b["label"], scores.table()
    return (
        captioned(score_differences(table, a, b), f"Score of {b} minus score of {a}, per task, with 95% intervals.")
        + captioned(flips(table, a, b), f"Items that changed side from {a} to {b}, per task.")
        + table_html(table, "Paired comparison; difference, low and high are fractions", digits=3)
    )


def _data(run: Run) -> str:
    from tinylab.data.trace import stored_shards

    sources = [{"source": s.name, "corpus": s.corpus, "limit (MB)": s.limit_mb} for s in run.config.data.sources]
    planned = captioned(mixture_of(run.config), f"Mixture of sources over tokens in {run.name}.") + table_html(
        sources, "Sources"
    )
    try:
        manifest = stored_shards(run).manifest
    except TinylabError as error:
        return planned + paragraph(error, note=True)
    rows = [
        {"split": split, "source": source, **{unit: entry[unit] for unit in ("documents", "tokens", "bytes")}}
        for split, entries in manifest["splits"].items()
        for source, entry in entries.items()
    ]
    return (
        planned
        + table_html(rows, f"Prepared data, fingerprint {manifest['fingerprint'][:16]}…")
        + table_html(manifest["tokenizer"], "Tokenizer")
        + table_html(manifest.get("report", {}), "Report of the preparation")
    )


def _provenance(run: Run) -> str:
    try:
        provenance: dict[str, Any] = dict(read_json(run.provenance_path))
    except (OSError, CheckpointError, ValueError, TypeError):
        provenance = {"provenance.json": "missing or unreadable"}
    if "time" in provenance:
        provenance = {"time (UTC)": _utc(provenance.pop("time"))} | provenance
    events = [
        {
            "event": e.get("event"),
            "time (UTC)": _utc(e.get("time", 0)),
            "step": e.get("step"),
            "tokens": e.get("tokens"),
        }
        for e in run.journal()
    ]
    return table_html(provenance, "Provenance") + (table_html(events, "Journal") if events else "")


def _utc(seconds: Any) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return str(seconds)
