"""What notebook 02 does: launch a run, resume it, follow it, stop it, or show it, as its folder requires."""

from __future__ import annotations

import os
from collections.abc import Sequence
from signal import SIGTERM

from tinylab.config import presets
from tinylab.config.counts import format_count
from tinylab.config.io import override
from tinylab.config.schema import RunConfig
from tinylab.dist import launch
from tinylab.dist.handle import Handle
from tinylab.errors import ConfigError, LaunchError, RunStopped
from tinylab.notebook.results import EXECUTOR_VARIABLE
from tinylab.runs.folder import Run

MODES = (*launch.MODES, "watch", "stop")


def planned(
    run: Run | str,
    preset: str | None = None,
    tokens: int | None = None,
    limit_mb: float | None = None,
    changes: Sequence[str] = (),
) -> RunConfig:
    """The configuration of the run: that of its folder if it exists, else `preset`, `tokens` long.

    `limit_mb` caps the text taken from each source of a new run (10^6 bytes); `changes` are its dotted overrides. A new
    run for which no preset is given is one of minutes: `tiny`, 200,000 tokens, 2 MB of text from each source.
    Raises ConfigError when the run exists and any of the three is given and differs from it.
    """
    run = run if isinstance(run, Run) else Run(run)
    if run.exists():
        _require_same(run, preset, tokens, limit_mb)
        return run.config
    if preset is None:
        preset, tokens, limit_mb = "tiny", tokens or 200_000, 2.0 if limit_mb is None else limit_mb
    config = presets.preset(preset, tokens)
    limits = [f"data.sources.{i}.limit_mb={limit_mb!r}" for i in range(len(config.data.sources)) if limit_mb]
    return override(config, [*limits, *changes])


def _require_same(run: Run, preset: str | None, tokens: int | None, limit_mb: float | None) -> None:
    config = run.config
    found = {
        f"preset = {preset}": preset in (None, config.preset),
        f"tokens = {tokens}": tokens is None or presets.scale_tokens(config, tokens).tokens == config.tokens,
        f"limit_mb = {limit_mb}": limit_mb is None or {s.limit_mb or 0 for s in config.data.sources} == {limit_mb},
    }
    if different := [text for text, same in found.items() if not same]:
        raise ConfigError(
            f"{run.path} is a run of preset {config.preset} over {format_count(config.tokens)} tokens, and a run keeps "
            f"its configuration; asked for: {', '.join(different)}. Leave these at None to continue it, or name "
            "another run"
        )


def continue_run(run: Run, config: RunConfig, mode: str = "auto", nproc: int | None = None, nodes: int = 1) -> str:
    """Bring the run to its end with a live view. Returns `started`, `resumed`, `attached`, `stopped` or `finished`.

    The modes of `launch` start a run that is not running: outside of this kernel, which may end meanwhile. `watch` only
    follows, `stop` ends the run after a checkpoint. An interrupt ends the following alone; under papermill, which
    cannot come back, it stops the run. A run that was stopped is no error, but under papermill, where it raises
    RunStopped. Raises ConfigError for any other mode, NothingFoundError where there is no run to watch or to stop,
    LaunchError when the run failed, and what `launch` raises.
    """
    from tinylab.widgets.monitor import Monitor

    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}; found {mode!r}")
    if mode in ("watch", "stop"):
        run.require()
    handle, before, monitor = Handle(run), run.status()["state"], Monitor(run)
    with monitor:
        if mode == "stop":
            handle.stop()
            return "stopped"
        if handle.is_alive():
            action = "attached"
        elif before == "done" or mode == "watch":
            return "finished" if before == "done" else before
        else:
            launch.launch(config, run, mode=mode, nproc=nproc, nodes=nodes)
            action = "started" if before == "none" else "resumed"
        code = _follow(handle)
    status = run.status()
    if code is None or status["state"] == "stopped":
        left = f"{run.name} {'trains on' if code is None else 'was stopped'} at step {status['step']} of {config.steps}"
        message = f"{left}; run this notebook again to {'follow' if code is None else 'resume'} it"
        if os.environ.get(EXECUTOR_VARIABLE):
            raise RunStopped(message, SIGTERM)
        print(message)
    elif code:
        raise LaunchError(f"{run.path} {status['state']}: {status.get('reason')}. Its logs: {run.logs_path}")
    return action


def _follow(handle: Handle) -> int | None:
    """Wait for the end of the run; its exit code, None if an interrupt ended the waiting."""
    try:
        return handle.wait()
    except KeyboardInterrupt:
        if os.environ.get(EXECUTOR_VARIABLE):
            handle.stop()
            raise
        return None
