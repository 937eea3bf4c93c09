"""A live view of a run folder: it follows `metrics.jsonl` by byte offset and never talks to the trainer."""

from __future__ import annotations

import threading
import time
from typing import Any

import pandas

from tinylab.config.counts import format_count, format_duration
from tinylab.html import parts
from tinylab.html.tables import table_html
from tinylab.plots.training import loss_curves
from tinylab.runs.folder import Run
from tinylab.runs.following import MetricsReader
from tinylab.widgets.show import Html

INTERVAL_S = 1.0
"""Seconds between two updates, at least."""

REST = 15.0
"""The view rests this many times as long as an update took, so that it takes little from a trainer beside it."""


class Monitor:
    """Table and loss curve of a run, updated in place at most once a second while the `with` block runs.

    Only the last state stays in a saved notebook. `.static()` is that state without a frontend.
    """

    def __init__(self, run: Run | str) -> None:
        self.run = run if isinstance(run, Run) else Run(run)
        self._reader = MetricsReader(self.run.metrics_path)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._handle: Any = None

    def read(self) -> list[dict[str, Any]]:
        """Every metrics line so far."""
        with self._lock:
            return self._reader.read()

    def summary(self) -> dict[str, str]:
        """The state of the run in words and numbers with units."""
        records, status = self.read(), self.run.status()
        rows = {"state": _state(status, self.run)}
        if not records:
            return rows | {"steps": "none yet"}
        last, config = records[-1], self.run.config
        rows["step"] = f"{last['step']:,} of {config.steps:,}"
        rows["tokens"] = f"{format_count(last['tokens'])} of {format_count(config.tokens)}"
        rows["stage"] = str(last["stage"])
        lost = "n/a (the step was refused)"
        rows["training loss"] = lost if last["loss"] is None else f"{last['loss']:.3f} nats per token"
        if measured := [r for r in records if r.get("validation_loss") is not None]:
            first, newest = measured[0]["validation_loss"], measured[-1]["validation_loss"]
            rows["validation loss"] = f"{first:.3f} → {newest:.3f} nats per token (step {measured[-1]['step']:,})"
        rows["learning rate"] = f"{last['lr']:.2e}"
        rows["gradient norm"] = lost if last["grad_norm"] is None else f"{last['grad_norm']:.2f} before clipping"
        recent = sorted(r["tokens_per_s"] for r in records[-50:])
        speed, left = recent[len(recent) // 2], config.tokens - last["tokens"]
        rows["speed"] = f"{speed:,.0f} tokens/s (median of the last {len(recent)} steps)"
        if left > 0 and status["state"] == "running":
            rows["time left"] = f"about {format_duration(left / speed)}"
        rows["MFU"] = "n/a (peak of this device unknown)" if last.get("mfu") is None else f"{last['mfu']:.1%}"
        rows["peak memory"] = f"{last['peak_memory_gib']:.2f} GiB"
        rows["checkpoints"] = str(len(self.run.checkpoints()))
        return rows

    def static(self) -> Html:
        """Table and loss curve as they are now, as HTML with the figure in it."""
        rows, records = self.summary(), self.read()
        html = table_html(rows, f"Run {self.run.name}")
        if len(records) > 1:
            figure = loss_curves([(self.run.name, pandas.DataFrame(records))])
            html += parts.picture(figure, f"Loss of run {self.run.name} over tokens")
        return Html(html, "; ".join(f"{k}: {v}" for k, v in rows.items()))

    def show(self) -> None:
        """Draw once, or replace what was drawn."""
        try:
            view = self.static()
        except Exception as error:
            view = Html(parts.error(error, f"Reading {self.run.path}"), str(error))
        if self._handle is None:
            from IPython.display import display

            self._handle = display(view, display_id=True)
        else:
            self._handle.update(view)

    def follow(self) -> str:
        """Watch until the run is no longer running (another process trains); its last state."""
        with self:
            while (state := self.run.status()["state"]) == "running":
                time.sleep(INTERVAL_S)
        return state

    def __enter__(self) -> Monitor:
        self._stop.clear()
        self.show()
        self._thread = threading.Thread(target=self._loop, name="tinylab-monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.show()

    def _loop(self) -> None:
        rest = INTERVAL_S
        while not self._stop.wait(rest):
            start = time.perf_counter()
            self.show()
            rest = max(INTERVAL_S, REST * (time.perf_counter() - start))


def _state(status: dict[str, Any], run: Run) -> str:
    state = str(status.get("state", "none"))
    if state == "running":
        return f"running, pid {status.get('pid')}"
    words = {
        "none": "not started",
        "stopped": "stopped after a checkpoint; run again to resume",
        "failed": "failed; see the journal",
        "lost": f"lost: {status.get('reason')}; run again to resume",
    }
    return f"{words.get(state, state)} ({run.name})"
