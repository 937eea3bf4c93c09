"""Verbs `launch`, `attach`, `stop` and `runs`: runs outside of this terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg

from tinylab.cli.output import Answer, table
from tinylab.cli.training import AS_IT_IS, Options, announce, resolve_config, summary_line
from tinylab.dist.handle import STOP_S, Handle
from tinylab.dist.handle import attach as handle_of
from tinylab.dist.launch import launch
from tinylab.errors import NothingFoundError
from tinylab.runs.folder import Run, home, list_runs
from tinylab.runs.summary import condition, require_known, run_summary, select, summarize

LINE_S = 10.0
"""Between the lines of `attach`."""
COLUMNS = (
    "run",
    "state",
    "step",
    "steps",
    "tokens",
    "loss",
    "validation_loss",
    "world",
    "checkpoints",
    "effective_time",
)


def launch_verb(
    run: Annotated[str, arg(metavar="RUN")],
    /,
    mode: str = "auto",
    nproc: int | None = None,
    nodes: int = 1,
    rendezvous: str | None = None,
    options: Options = AS_IT_IS,
) -> Answer:
    """Start a run or resume it outside of this terminal: it outlives the terminal, the notebook and the connection.
    Returns when its trainer stands. For a run that exists, `tinylab launch RUN` is enough.

    Args:
        run: run folder, or a name below runs/.
        mode: torchrun (what auto means), process (one rank without torchrun) or slurm (a job of a cluster).
        nproc: processes per node; default: its GPUs, 1 on a CPU.
        nodes: number of nodes; without Slurm, give the same command on each.
        rendezvous: HOST:PORT where several nodes meet without Slurm: an address of one of them and a free port.
    """
    folder = Run(run)
    config = resolve_config(folder, options)
    announce(folder, config, options.tokens)
    handle = launch(config, folder, mode=mode, nproc=nproc, nodes=nodes, rendezvous=rendezvous, tied=False)
    record = {k: v for k, v in handle.record.items() if k in ("mode", "pid", "job", "world", "log")}
    what = f"job {record['job']}" if "job" in record else f"pid {record.get('pid')}"
    text = (
        f"{folder.path}: {handle.state()}, {record['world']} ranks, mode {record['mode']}, {what}\n"
        f"follow: tinylab attach {run}    stop after a checkpoint: tinylab stop {run}    log: {record['log']}"
    )
    return Answer({"run": folder.name, "path": str(folder.path), "state": handle.state(), **record}, text)


def attach_verb(run: Annotated[str, arg(metavar="RUN")], /) -> Answer:
    """Follow a run to its end. The exit code is the run's own: 0 done, 143 stopped, 1 failed. Ctrl-C only ends the
    following.

    Args:
        run: run folder, or a name below runs/.
    """
    handle = handle_of(run)
    code = handle.attach(_Progress(handle.run).line)
    return _end(handle, code)


def stop_verb(run: Annotated[str, arg(metavar="RUN")], /, timeout: float = STOP_S) -> Answer:
    """End a run after a checkpoint, from any host that sees its folder, and wait until it has ended.

    Args:
        run: run folder, or a name below runs/.
        timeout: seconds to wait for it.
    """
    handle = handle_of(run)
    state = handle.stop(timeout)
    return _end(handle, 1 if state in ("failed", "lost") else 0)


def runs_verb(
    root: Annotated[str | None, arg(metavar="FOLDER")] = None,
    /,
    sort: str | None = None,
    where: UseAppendAction[tuple[str, ...]] = (),
    column: UseAppendAction[tuple[str, ...]] = (),
) -> Answer:
    """List runs with their state, progress and losses.

    Args:
        root: folder that contains run folders; default: runs/ in TINYLAB_HOME.
        sort: column or configuration key to sort by; -loss: descending (write --sort=-loss).
        where: condition such as loss<3, state=running or optimizer.lr=1e-3; may be repeated: all must hold.
        column: configuration key to show, such as optimizer.lr; may be repeated for others.
    """
    place = Path(root).expanduser().absolute() if root else home() / "runs"
    conditions = [condition(text) for text in where]
    found = list_runs(place)
    if not found:
        raise NothingFoundError(f"{place} must contain run folders; found none. Start one: tinylab train mine")
    keys = [*column, *(key for key, _, _ in conditions), *([sort.removeprefix("-")] if sort else [])]
    rows = summarize(found, keys)
    for row in rows:
        if "error" in row:
            print(f"warning: {row['run']}: {row['error']}", file=sys.stderr)
    require_known(keys, rows)
    rows = select(rows, conditions, sort)
    return Answer(rows, table(rows, [*COLUMNS, *(c for c in column if c not in COLUMNS)]) or "no run fits")


class _Progress:
    """A line about a followed run, at its first step seen and then not more often than each ten seconds."""

    def __init__(self, run: Run) -> None:
        self._run, self._steps, self._printed = run, 0, 0.0

    def line(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        self._steps = self._steps or self._run.config.steps
        if now - self._printed >= LINE_S or record["step"] == self._steps:
            self._printed = now
            print(
                f"step {record['step']}/{self._steps}  {record['tokens']:,} tokens  loss {record['loss']:.3f}  "
                f"{record['tokens_per_s']:,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )


def _end(handle: Handle, code: int) -> Answer:
    """Where the run is now, and why it ended if it did not end well."""
    if not handle.run.exists():
        raise NothingFoundError(f"{handle.run.path} ended before it became a run; its log: {handle.tail()}")
    summary, status = run_summary(handle.run), handle.run.status()
    reason = f"; {status['reason']}" if "reason" in status and summary["state"] in ("failed", "lost") else ""
    return Answer(summary, summary_line(summary) + reason, code)
