"""torchrun for a run: torch's own agent and rendezvous, with a log for each rank, the ranks' exit code, and stops.

    python -m tinylab.dist.supervisor [--tied FD] [torchrun's options] -m tinylab train RUN …

| what | how |
|---|---|
| logs | RUN/logs/rank-N.log, N counted over all nodes, appended to (`--log-dir`: another folder) |
| SIGTERM, SIGHUP, SIGUSR1, SIGINT | passed on to the ranks, which commit a checkpoint and end; exit code 143, for SIGINT 130 |
| exit code | 0 when every rank ended well, else that of the rank that ended first; 1 for a killed rank |
| `--tied FD` | FD is the read end of a pipe: when its writer has ended, however it died, the ranks are asked to stop |
| `--in-process` | without torchrun: this process is the only rank |

Several nodes meet over c10d: `--nnodes N --rdzv-backend c10d --rdzv-endpoint HOST:PORT --rdzv-id ID` on each of them.
Killed with SIGKILL it cannot pass anything on: then the ranks notice by themselves that it is gone.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tinylab.dist.rank_logs import MESSAGE, RankLogs, last_message
from tinylab.errors import EXIT_FAILED, LaunchError, TinylabError
from tinylab.runs.folder import Run

SIGNALS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
}
"""Signals that stop the ranks, and what the ranks are sent."""
PATIENCE_S = 120
"""How long the ranks may take to end after a signal; then they are killed as torchrun does it, 30 s after a SIGTERM."""
TO_LOG = 'exec "$@" >>"$TINYLAB_LOG" 2>&1'
"""A shell starts each rank, because torchrun opens its logs anew for every stream and every start."""


class Process(Protocol):
    """What is used of a started rank (subprocess.Popen)."""

    def poll(self) -> int | None: ...
    def send_signal(self, sig: int) -> None: ...


class Stops:
    """Passes signals on to the ranks, once there are any; before that, a signal ends this process."""

    def __init__(self) -> None:
        self._ranks: list[Process] = []
        self._starting = False
        self._asked: signal.Signals | None = None

    def install(self) -> None:
        """From now on these signals are handled here."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.signal(signal.SIGALRM, self._lose_patience)

    def starting(self) -> None:
        """Ranks are being started: a signal waits until they can receive it."""
        self._starting = True

    def started(self, ranks: Iterable[Process]) -> None:
        """These processes are the ranks of this node."""
        self._ranks, self._starting = list(ranks), False
        if self._asked is not None:
            self._pass_on(self._asked)

    def codes(self) -> list[int]:
        """Exit codes, other than 0, of ranks that have ended."""
        return [code for rank in self._ranks if (code := rank.poll())]

    def _note(self, number: int, _: Any) -> None:
        self._asked = SIGNALS[signal.Signals(number)]
        if self._ranks:
            self._pass_on(self._asked)
        elif not self._starting:
            print(f"{MESSAGE}stopped before its ranks were started ({signal.Signals(number).name})", file=sys.stderr)
            raise SystemExit(128 + self._asked)

    def _pass_on(self, number: signal.Signals) -> None:
        signal.alarm(PATIENCE_S)
        for rank in self._ranks:
            with suppress(ProcessLookupError):
                rank.send_signal(number)

    def _lose_patience(self, *_: Any) -> None:
        from torch.distributed.elastic.multiprocessing import SignalException

        raise SignalException(f"the ranks did not end within {PATIENCE_S} s of a signal", signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    """Run the command line of the module docstring; its exit code."""
    stops = Stops()
    stops.install()
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--tied", type=int)
    own.add_argument("--in-process", action="store_true")
    options, rest = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    if options.tied is not None:
        threading.Thread(target=_stop_at_end_of, args=(options.tied,), name="tied", daemon=True).start()
    try:
        return _in_process(rest) if options.in_process else _torchrun(rest, stops)
    except TinylabError as error:
        print(f"{MESSAGE}{error}", file=sys.stderr, flush=True)
        return error.exit_code


def _stop_at_end_of(descriptor: int) -> None:
    """Stop this process as SIGTERM does, once no process holds the write end of the pipe any more."""
    while os.read(descriptor, 1):
        pass
    print("the process that launched this run has ended: it stops after a checkpoint", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _in_process(command: list[str]) -> int:
    """Run `-m tinylab train …` here, with the signals as Python has them; the trainer sets its own."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if command[:1] != ["-m"] or len(command) < 2:
        raise LaunchError(f"--in-process needs -m MODULE …; found {' '.join(command) or 'nothing'}")
    sys.argv = command[1:]
    runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    return 0


def _torchrun(arguments: list[str], stops: Stops) -> int:
    """Start the ranks of this node and watch them, as torchrun does with these arguments; the exit code."""
    import torch.distributed.elastic.rendezvous.registry as registry
    from torch.distributed import DistError
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
    from torch.distributed.run import config_from_args, get_args_parser

    given = get_args_parser().parse_args(arguments)
    if given.rdzv_backend == "static" or given.standalone:
        if given.nnodes not in ("1", "1:1"):
            raise LaunchError(
                f"several nodes must meet over c10d; found --nnodes {given.nnodes} without it. Add --rdzv-backend c10d "
                "--rdzv-endpoint HOST:PORT --rdzv-id ID"
            )
        # Nothing outside this machine can reach the rendezvous, and no name of it need resolve.
        given.rdzv_backend, given.rdzv_endpoint, given.rdzv_id = "c10d", "localhost:0", str(os.getpid())
        given.local_addr = given.local_addr or "127.0.0.1"
    given.local_addr = given.local_addr or _address_towards(given.rdzv_endpoint)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would say so loudly; `parallel.threads` sets the number
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # all others are handled here
    logs = RankLogs(Path(given.log_dir) if given.log_dir else _logs_of(given.training_script_args))
    config, program, program_arguments = config_from_args(given)
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    try:
        spec = WorkerSpec(
            role="train",
            local_world_size=config.nproc_per_node,
            entrypoint="sh",
            args=("-c", TO_LOG, "rank", program, *program_arguments),
            rdzv_handler=registry.get_rendezvous_handler(parameters),
            max_restarts=0,  # a start after a failure is decided by whoever started this
            monitor_interval=config.monitor_interval,
            local_addr=config.local_addr,
            numa_options=config.numa_options,
        )
        result = _agent(spec, logs.specs(), stops).run()
    except SignalException as error:
        print(f"{MESSAGE}{error}; they were killed. Repeat the same command to go on", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except (RendezvousError, DistError, OSError) as error:
        if codes := stops.codes():  # another node ended first and took the rendezvous along
            return exit_code_of(codes[0])
        raise LaunchError(
            f"all {config.max_nodes} nodes must reach the rendezvous at {config.rdzv_endpoint}; found: "
            f"{str(error.__cause__ or error) or type(error).__name__}. Start the same command on every node, with an address and a port that all "
            "of them can reach"
        ) from error
    finally:
        signal.alarm(0)
    if result is None:
        raise LaunchError(f"the rendezvous at {config.rdzv_endpoint} was closed before all nodes were there")
    if not result.is_failed():
        return 0
    rank, code = cause({rank: failure.exitcode for rank, failure in _by_time(result.failures)}, logs)
    print(_told(rank, code, logs), file=sys.stderr, flush=True)
    return exit_code_of(code)


def exit_code_of(code: int) -> int:
    """This process's exit code for that of a rank: stopped by a signal before it could handle it, or killed."""
    stopped = {-signal.SIGINT: 130, -signal.SIGTERM: 143}
    return stopped.get(code, EXIT_FAILED) if code < 0 else code


def _agent(spec: Any, specs: Any, stops: Stops) -> Any:
    """torch's agent, whose ranks are known to `stops`."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            stops.starting()
            pids = super()._start_workers(worker_group)  # type: ignore[call-arg]
            stops.started(handler.proc for handler in self._pcontext.subprocess_handlers.values())  # type: ignore
            return pids

    return Agent(spec, logs_specs=specs, start_method="spawn")


def _address_towards(endpoint: str) -> str | None:
    """The address of this machine on the network of HOST:PORT, because its name need not resolve on the others."""
    host, _, port = endpoint.rpartition(":")
    with suppress(OSError, ValueError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing
        return probe.getsockname()[0]
    return None


def _logs_of(command: list[str]) -> Path:
    """RUN/logs of a command `train RUN …`."""
    if command[:1] != ["train"] or len(command) < 2:
        raise LaunchError(f"the ranks must run `tinylab train RUN`; found {' '.join(command) or 'nothing'}")
    return Run(command[1]).logs_path


def _by_time(failures: dict[int, Any]) -> list[tuple[int, Any]]:
    return sorted(failures.items(), key=lambda item: item[1].timestamp)


def cause(codes: dict[int, int], logs: RankLogs) -> tuple[int, int]:
    """The rank that others ended for, and its code: the first, or the first with another message than theirs."""
    from tinylab.dist.watch import OTHERS_GONE

    first = next(iter(codes.items()))
    if OTHERS_GONE not in logs.written(first[0]):
        return first
    own = (item for item in codes.items() if item[1] < 128 and OTHERS_GONE not in logs.written(item[0]))
    return next(own, first)


def _told(rank: int, code: int, logs: RankLogs) -> str:
    """How a rank ended, with its own message."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    message = last_message(logs.written(rank))
    return f"{MESSAGE}rank {rank} {how}{': ' + message if message else ''} (log: {logs.path(rank)})"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python's own end aborts (exit code 134) when torch's keep-alive thread is in C++ at that moment
