"""Where this process stands among the processes of a job: rank, world and device as one object."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from tinylab.config.schema import Parallel
from tinylab.dist.watch import Watch
from tinylab.errors import LaunchError, RunStopped

START_S = 300.0
"""How long ranks wait for one another until the first step is done; after it, `parallel.timeout_s`."""
AGENT_S = 2.0
"""How long torchrun may refuse connections until it counts as gone."""
POLL_S = 0.2
"""How often a waiting rank looks for rank 0's note."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Context:
    """One process of a training job. A single process has world 1 and needs no process group."""

    device: torch.device
    """Where this process computes."""
    rank: int = 0
    """Number of this process, from 0; rank 0 writes the run folder."""
    world: int = 1
    """Number of processes."""
    local_world: int = 1
    """Number of processes on this machine."""
    threads: int = 1
    """CPU threads of this process."""
    store: Store | None = None
    """Where ranks leave each other notes outside of collectives; None for one process."""
    watch: Watch = field(default_factory=Watch)
    """What this rank sees of its launcher and of the other ranks."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Each value summed over all ranks, exact while the sums stay below 2^63. On the CPU: no device waits."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        distributed.all_reduce(tensor)
        return tensor.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, in place, on its own device."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def require_equal(self, digest: str, what: str) -> None:
        """Raise LaunchError naming the ranks whose `digest` differs from rank 0's."""
        own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
        parts = self.gather_tensor(own)
        other = [str(rank) for rank, part in enumerate(parts) if not torch.equal(part, parts[0])]
        if other:
            raise LaunchError(
                f"{what} must be equal on all {self.world} ranks before the first step; rank {', '.join(other)} "
                "differs from rank 0. Start every rank from the same code, configuration and files"
            )

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """`tensor` of every rank, by rank, on every rank; equal shapes and types."""
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        distributed.all_gather(parts, tensor)
        return parts

    def without_notes(self) -> Context:
        """The same context, in which no rank has left a note yet."""
        return self if self.store is None else replace(self, store=PrefixStore("later", self.store))

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.world > 1:
            self.sum_integers([0])

    def expect_steps(self, timeout_s: float) -> None:
        """From now on wait at most `timeout_s` in an exchange: compiling and preparing are over."""
        if self.world == 1:
            return
        for group in list(distributed.distributed_c10d._world.pg_map):
            distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
        self.watch.expect_steps(timeout_s)

    def after_main(self, on_main: Callable[[], T], on_others: Callable[[], T], what: str) -> T:
        """`on_main()` on rank 0, and when it returned, `on_others()` on the other ranks. Once per `what`.

        They wait for as long as it takes: no collective is under way that could time out. Raises LaunchError on the
        other ranks within seconds when it failed, naming the error.
        """
        if self.store is None:
            return on_main()
        key = f"after main: {what}"
        if self.is_main:
            try:
                result = on_main()
            except BaseException as error:
                self.store.set(key, str(error) or type(error).__name__)
                deadline = time.monotonic() + 10 * POLL_S  # the store may end with this process: let the others read
                while self.store.add(f"{key}: read", 0) < self.world - 1 and time.monotonic() < deadline:
                    time.sleep(POLL_S / 10)
                raise
            self.store.set(key, "")
            return result
        while not self.store.check([key]):
            time.sleep(POLL_S)
        failure = self.store.get(key).decode()
        self.store.add(f"{key}: read", 1)
        if failure:
            raise LaunchError(f"rank 0 must have {what} ready before the other ranks begin; it failed: {failure}")
        return on_others()


@contextmanager
def open_context(parallel: Parallel, orphaned: Callable[[], None] = lambda: None) -> Iterator[Context]:
    """The context of this process, from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE).

    Sets the number of CPU threads; a job of several processes gets a process group (gloo for CPU tensors, NCCL for
    CUDA ones) that ends with the context. `orphaned` is called in another thread when torchrun is gone.
    Raises LaunchError when the asked device or a peer is missing.
    """
    rank, world = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
    if rank >= world:
        raise LaunchError(
            f"RANK must lie below WORLD_SIZE; found RANK {rank} and WORLD_SIZE {world}. Start all ranks with torchrun, "
            "or unset both for one process"
        )
    local_rank, local_world = _integer("LOCAL_RANK", rank), _integer("LOCAL_WORLD_SIZE", world)
    with Watch(rank, world, orphaned) as watch:
        device = _device(parallel.device, local_rank)
        # The number of threads changes the last bits of sums: in canonical mode it must not follow from that of ranks.
        cores = 1 if parallel.reduction == "canonical" else len(os.sched_getaffinity(0))
        threads = parallel.threads or max(1, cores // local_world)
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        context = Context(rank=rank, world=world, local_world=local_world, device=device, threads=threads, watch=watch)
        if world == 1:
            yield context
            return
        try:
            with _process_group(context) as store:
                watch.meet(store)
                context = replace(context, store=PrefixStore("notes", store))
                with other_ranks_alive(context):
                    yield context
        finally:
            watch.leave()


@contextmanager
def _process_group(context: Context) -> Iterator[Store]:
    """The process group of the job, and its store. Raises LaunchError when a peer is missing."""
    rank, world, start_s = context.rank, context.world, timedelta(seconds=START_S)
    cuda = context.device.type == "cuda"
    if cuda:  # which collective each rank was in is written down when one times out
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "20000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    try:
        store = _own_store(rank, world)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            rank=rank,
            world_size=world,
            store=PrefixStore("group", store),
            timeout=start_s,
        )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {rank} of {world} must reach the others at MASTER_ADDR:MASTER_PORT; found: {error}. "
            "Start all ranks with torchrun"
        ) from error
    try:
        yield store
    finally:
        distributed.destroy_process_group()


def _own_store(rank: int, world: int) -> Store:
    """The store of the job, in the process of rank 0. torchrun's own would end with torchrun, and with it every save.

    torchrun's is there before the ranks are; without torchrun, rank 0 begins the store at MASTER_PORT.
    """
    start_s = timedelta(seconds=START_S)
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launched:
        _require_listening(os.environ["MASTER_ADDR"], _integer("MASTER_PORT", 0))
    met, _, _ = next(rendezvous("env://", rank, world, timeout=start_s))
    if not launched:
        return met
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        own = distributed.TCPStore(host, 0, world, True, start_s, wait_for_workers=False)  # type: ignore
        met.set("tinylab port", str(own.port))
        return own
    return distributed.TCPStore(host, int(met.get("tinylab port")), world, False, start_s)  # type: ignore


def _require_listening(host: str, port: int) -> None:
    """Raise LaunchError when the store of torchrun, which listens before it starts a rank, refuses for AGENT_S.

    torchrun is gone then, and was before this process could see who started it; torch itself would try for minutes.
    """
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            socket.create_connection((host, port), timeout=START_S).close()
            return
        except ConnectionRefusedError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"torchrun must live as long as its ranks; {host}:{port}, where it listened, refuses. Start the "
                    "job again"
                ) from error
            time.sleep(POLL_S)
        except OSError as error:
            raise LaunchError(f"{host}:{port}, where torchrun listens, must be reachable; found: {error}") from error


@contextmanager
def other_ranks_alive(context: Context) -> Iterator[None]:
    """An error with rank and step in place of what torch raises when another rank ended or fell silent.

    So too where this rank was stopped before its first step only because another rank had failed.
    """
    try:
        yield
    except (RuntimeError, RunStopped) as error:
        watch = context.watch
        if context.world == 1:
            raise
        if isinstance(error, RunStopped):
            found = None if watch.began else watch.gone()
        # gloo raises plain RuntimeErrors and tells its own only by the source file in their text.
        elif isinstance(error, distributed.DistError) or "gloo" in str(error):
            watch.leave()
            found = watch.trouble() or f"its own message says why ({error})"
        else:
            raise
        if found is None:
            raise
        raise watch.error(found) from error


def _integer(name: str, default: int) -> int:
    """A whole number from the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise LaunchError(f"{name} must be a whole number; found {text!r}. Start the job with torchrun")
    return int(text)


def _device(wanted: str, local_rank: int) -> torch.device:
    """The device `wanted` (`auto`: CUDA where there is one)."""
    available = torch.cuda.is_available() if wanted != "cpu" else False
    if wanted == "cuda" and not available:
        raise LaunchError('parallel.device = "cuda" needs a working CUDA device; found none. Set it to "cpu" or "auto"')
    if not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"every rank of a machine needs its own CUDA device; found {torch.cuda.device_count()} for local rank "
            f"{local_rank}. Start fewer processes per machine"
        )
    return torch.device("cuda", local_rank)
