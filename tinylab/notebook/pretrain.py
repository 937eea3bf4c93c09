"""What notebook 02 does: start a run, resume it, follow it, or show it finished, as its folder requires."""

from collections.abc import Sequence

from tinylab.config import presets
from tinylab.config.io import override
from tinylab.config.schema import RunConfig
from tinylab.errors import ConfigError
from tinylab.runs.folder import Run

MODES = ("auto", "process", "watch")


def planned(
    run: Run | str, preset: str, tokens: int | None = None, limit_mb: float | None = None, changes: Sequence[str] = ()
) -> RunConfig:
    """The configuration of the run: that of its folder if it exists, else `preset`, `tokens` long.

    `limit_mb` caps the text taken from each source of a new run (10^6 bytes); `changes` are its dotted overrides.
    """
    run = run if isinstance(run, Run) else Run(run)
    if run.exists():
        return run.config
    config = presets.preset(preset, tokens)
    limits = [f"data.sources.{i}.limit_mb={limit_mb!r}" for i in range(len(config.data.sources)) if limit_mb]
    return override(config, [*limits, *changes])


def continue_run(run: Run, config: RunConfig, mode: str = "auto") -> str:
    """Bring the run to its end with a live view. Returns what was done: `started`, `resumed`, `attached`, `finished`.

    `auto` and `process` train in this process, which ends with its kernel; `watch` only follows another trainer.
    Raises ConfigError for any other mode, NothingFoundError if there is nothing to watch, and what `train` raises.
    """
    from tinylab.widgets.monitor import Monitor

    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}; found {mode!r}")
    if mode == "watch":
        run.require()
    state, monitor = run.status()["state"], Monitor(run)
    if state == "running":
        monitor.follow()
        return "attached"
    if state == "done" or mode == "watch":
        monitor.show()
        return "finished" if state == "done" else state
    from tinylab.training.loop import train

    with monitor:
        train(config, run, progress=False)
    return "started" if state == "none" else "resumed"
