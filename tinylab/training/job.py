"""What one process of a training job works with, as one object."""

from __future__ import annotations

from dataclasses import dataclass

from tinylab.config.schema import RunConfig
from tinylab.data.shards.reader import ShardSet
from tinylab.dist.context import Context
from tinylab.runs.folder import Run
from tinylab.runs.metrics import MetricsLog


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process's view of a run: what is trained, where it is written, on which rank and device, on which data."""

    config: RunConfig
    run: Run
    context: Context
    shards: ShardSet

    @property
    def log(self) -> MetricsLog:
        """The run's `metrics.jsonl`; rank 0 writes it."""
        return self.run.metrics_log
