"""`metrics.jsonl`: one line per optimizer step, appended, tailed by byte offset, repaired after a kill."""

from __future__ import annotations

import os
from typing import Any

from tinylab.errors import did_you_mean
from tinylab.runs.durable import complete_lines, parse_line, repair_tail
from tinylab.runs.regular import open_regular
from tinylab.runs.sealed_log import SealedLog

UNITS = {
    "step": "optimizer steps, from 1",
    "tokens": "tokens after the step, over all ranks",
    "loss": "nats per token, mean over the global batch; null where it is not finite or was not computed",
    "lr": "learning rate of the step",
    "grad_norm": "global norm before clipping",
    "stage": "name of the stage",
    "refused": "why the step's update was not made: nonfinite, spike or left out (by a rewind); null where it was",
    "step_time_s": "s",
    "data_wait_s": "s",
    "data_hash": "hash of the addresses of the step's samples",
    "tokens_per_s": "tokens/s over all ranks",
    "mfu": "share of the devices' dense bf16 peak, by FLOPs formula F; null where the peak is unknown",
    "peak_memory_gib": "GiB on this rank",
    "validation_loss": "nats per token on held-out documents, after the step",
    "bits_per_byte": "bits per byte of held-out text, after the step",
    "validation_s": "s to measure them, not part of step_time_s",
}
"""Every metric and its unit."""


_TEXT = frozenset({"stage", "data_hash", "refused"})


class MetricsLog(SealedLog):
    """Appends lines to `metrics.jsonl`. Each line reaches the operating system before `append` returns."""

    def append(self, record: dict[str, Any], *, sync: bool = False) -> None:
        """Add one step's line. Its keys must be in `UNITS`."""
        assert set(record) <= set(UNITS), f"unknown metrics: {set(record) - set(UNITS)}"
        super().append(record, sync=sync)

    def problem(self, record: dict[str, Any], previous: dict[str, Any]) -> str | None:
        """Why a line is no step's: an unknown key, a value of another kind, a step that does not come next."""
        for key, value in record.items():
            if key not in UNITS:
                return f"unknown key {key!r}; {did_you_mean(key, UNITS, 'known: ' + ', '.join(UNITS))}"
            if value is not None and not isinstance(value, str if key in _TEXT else int | float):
                return f"{key} must be {'text' if key in _TEXT else 'a number'}; found {str(value)[:80]!r}"
        step = record.get("step")
        if type(step) is not int or step <= previous.get("step", 0):
            return f"step must be a whole number above {previous.get('step', 0)}; found {str(step)[:80]}"
        return None

    def is_later(self, record: dict[str, Any], last: dict[str, Any]) -> bool:
        """Whether the line is one of a later step."""
        return record["step"] > last["step"]

    def cut_after(self, step: int) -> list[dict[str, Any]]:
        """Drop a torn last line and every line of a later step, and return the dropped lines.

        Reads only what is behind the seal, unless sealed lines themselves are later.
        """
        repair_tail(self.path)
        if (parse_line(self._last) or {}).get("step", 0) > step:
            self._forget()
        size, dropped = self._bytes, []
        for line, end in complete_lines(self.path, self._bytes):
            record = parse_line(line)
            if dropped or record is None or record.get("step", step + 1) > step:
                dropped.append(record)
            else:
                size = end
        if dropped:
            with open(open_regular(self.path, os.O_RDWR), "rb+") as file:
                file.truncate(size)
        return [record for record in dropped if record]
