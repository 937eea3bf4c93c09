"""Steps whose loss is unusually high, with the hash of their batch."""

import numpy as np
import pandas

from tinylab.runs.folder import Run


def loss_spikes(run: Run, count: int = 5, window: int = 25) -> pandas.DataFrame:
    """The `count` steps whose loss is highest above the median of the `window` steps before them.

    Columns: `step, tokens, stage, loss, expected` (that median), `excess` (nats), `deviations` (excess over the
    typical deviation, 1.4826 median absolute deviations of the window), `grad_norm, data_hash`. The first `window`
    steps are left out, because the loss falls faster there than it scatters.
    """
    records = run.metric_records()
    losses = np.array([r["loss"] for r in records], dtype=float)
    rows = []
    for i in range(window, len(records)):
        before = losses[i - window : i]
        expected = float(np.median(before))
        spread = 1.4826 * float(np.median(np.abs(before - expected)))
        record = records[i]
        rows.append(
            {name: record.get(name) for name in ("step", "tokens", "stage", "loss")}
            | {"expected": expected, "excess": losses[i] - expected}
            | {"deviations": (losses[i] - expected) / max(spread, 1e-9)}
            | {name: record.get(name) for name in ("grad_norm", "data_hash")}
        )
    return pandas.DataFrame(sorted(rows, key=lambda row: -row["excess"])[:count])
