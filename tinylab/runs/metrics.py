"""`metrics.jsonl`: one line per optimizer step, appended, tailed by byte offset, repaired after a kill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tinylab.runs.durable import append_line, fsync_path, read_lines, repair_tail

UNITS = {
    "step": "optimizer steps, from 1",
    "tokens": "tokens after the step, over all ranks",
    "loss": "nats per token, mean over the global batch",
    "lr": "learning rate of the step",
    "grad_norm": "global norm before clipping",
    "stage": "name of the stage",
    "step_time_s": "s",
    "data_wait_s": "s",
    "data_hash": "hash of the addresses of the step's samples",
    "tokens_per_s": "tokens/s over all ranks",
    "mfu": "share of the devices' dense bf16 peak, by FLOPs formula F; null where the peak is unknown",
    "peak_memory_gib": "GiB on this rank",
    "validation_loss": "nats per token on held-out documents, after the step",
    "bits_per_byte": "bits per byte of held-out text, after the step",
}
"""Every metric and its unit."""


class MetricsLog:
    """Appends lines to `metrics.jsonl`. Each line reaches the operating system before `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add one step's line. Its keys must be in `UNITS`."""
        assert set(record) <= set(UNITS), f"unknown metrics: {set(record) - set(UNITS)}"
        append_line(self.path, record, sync=False)

    def sync(self) -> None:
        """Flush to the device; called before a checkpoint commits."""
        if self.path.exists():
            fsync_path(self.path)

    def cut_after(self, step: int) -> list[dict[str, Any]]:
        """Drop a torn last line and every line of a later step, and return the dropped lines."""
        repair_tail(self.path)
        records, _ = read_lines(self.path)
        kept = sum(1 for r in records if r["step"] <= step)
        if kept < len(records):
            with open(self.path, "rb") as file:
                size = sum(len(file.readline()) for _ in range(kept))
            os.truncate(self.path, size)
        return records[kept:]
