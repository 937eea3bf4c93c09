"""A run is a folder: paths, lock, status, journal, metrics, and what views read from it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylab.config.io import parse_run, run_to_toml
from tinylab.config.schema import RunConfig
from tinylab.errors import CheckpointError, ConfigError, NothingFoundError
from tinylab.runs.durable import disk_error, failpoint, write_atomic
from tinylab.runs.effective_time import TrainerClock
from tinylab.runs.journal import JournalLog
from tinylab.runs.metrics import MetricsLog
from tinylab.runs.regular import open_regular, read_regular
from tinylab.runs.status import STALE_HEARTBEAT_S, new_status, other_host, read_status

if TYPE_CHECKING:
    import pandas

MAX_CONFIG_BYTES = 1_000_000
RESERVE_BYTES = 16_384
"""Of a run's disk, held by its lock file: room for its last words when the disk is full."""
LAST_WORDS = ("stopped", "failed")
_OWN = frozenset(
    [
        "config.toml",
        "provenance.json",
        "journal.jsonl",
        "metrics.jsonl",
        "status.json",
        "attention.json",
        "lock",
        "stop",
        "logs",
        "evaluations",
        "checkpoints",
        "sealed",
        "quarantine",
        "notebooks",
        "report.html",
    ]
)
"""What may be in a run folder before its first start."""
_STEP = re.compile(r"step-(\d{8,})")


def home() -> Path:
    """The folder that holds `data/` and `runs/`: TINYLAB_HOME, else the current folder.

    In the `notebooks/` of a checkout, where Jupyter and VS Code start kernels, it is the checkout.
    """
    if place := os.environ.get("TINYLAB_HOME"):
        return _expanded(place)
    here = Path.cwd()
    return here.parent if here.name == "notebooks" and (here.parent / "tinylab" / "cli").is_dir() else here


def resolve_run(name: str | Path) -> Path:
    """The folder of a run given as a path, or as a name below `runs/`. Raises ConfigError for none, or with NUL."""
    text = str(name)
    if not text.strip():
        raise ConfigError(f"a run must have a name or a path; found {text!r}. Give one, such as mine")
    if "\0" in text:
        raise ConfigError(f"the path of a run must not hold NUL; found {text!r}. Give another")
    is_path = os.sep in text or text.startswith(("~", ".")) or (Path(text) / "config.toml").exists()
    return _expanded(text) if is_path else home() / "runs" / text


def _expanded(text: str) -> Path:
    """An absolute path, ~ and ~user written out. Raises ConfigError for a user who has no home folder."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{text} must name a folder; {error}. Give a path without ~") from error


def step_name(step: int) -> str:
    """Name of a checkpoint's folder: `step-00000500`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder name, as an integer; None for any other name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


class Run:
    """One run folder, read by every view and written by its trainer.

    `.config`, `.metrics()`, `.checkpoints()`, `.status()` and `.journal()` read; nothing here talks to a trainer.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = resolve_run(path)
        self.config_path = self.path / "config.toml"
        self.provenance_path = self.path / "provenance.json"
        self.journal_path = self.path / "journal.jsonl"
        self.metrics_path = self.path / "metrics.jsonl"
        self.status_path = self.path / "status.json"
        self.attention_path = self.path / "attention.json"
        self.checkpoints_path = self.path / "checkpoints"
        self.evaluations_path = self.path / "evaluations"
        self.logs_path = self.path / "logs"
        self.journal_log = JournalLog(self.journal_path)
        self.metrics_log = MetricsLog(self.metrics_path)
        self.clock = TrainerClock()
        self._lock_path = self.path / "lock"
        self._lock: int | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def name(self) -> str:
        """Name of the run: that of its folder, control characters spelled out."""
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in self.path.name)

    def exists(self) -> bool:
        """Whether the folder holds a run (it has a configuration)."""
        return self.config_path.exists()

    def require_place_of_its_own(self) -> None:
        """Raise ConfigError where a new run would scatter its files among others, or have a name that cannot be shown.

        A run that exists, a missing folder and one that holds nothing but a run's files are all right.
        """
        if self.exists():
            return
        if "@" in self.path.name or not self.path.name.isprintable():
            what = "@, which stands before a step in RUN@STEP" if "@" in self.path.name else "control characters"
            raise ConfigError(
                f"the name of a run must not contain {what}; found {self.path.name!r}. Choose another name"
            )
        names = os.listdir(self.path) if self.path.is_dir() else []
        others = sorted(n for n in names if n not in _OWN and not n.startswith((".", "launch.", "slurm")))
        if others or os.path.realpath(self.path) in ("/", os.path.realpath(os.path.expanduser("~"))):
            found = f"{len(others)} other files: {', '.join(others[:3])}" if others else "a home folder"
            raise ConfigError(
                f"{self.path} must be a run, or a new or empty folder; found {found}. Choose another folder, or give a "
                "name such as mine"
            )

    def require(self) -> Run:
        """This run, or NothingFoundError when the folder holds none."""
        if not self.exists():
            raise NothingFoundError(
                f"{self.path} must hold a run (config.toml); found none. Start one: tinylab train {self.path}"
            )
        return self

    @property
    def config(self) -> RunConfig:
        """The whole resolved configuration."""
        path = self.require().config_path
        return parse_run(read_regular(path, MAX_CONFIG_BYTES), where=str(path))

    def create(self, config: RunConfig, provenance: dict[str, Any]) -> None:
        """Make the folder with its configuration and provenance, private to the user."""
        try:
            for folder in (self.path, self.checkpoints_path, self.logs_path, self.evaluations_path):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.path, error) from error
        write_atomic(self.provenance_path, json.dumps(provenance, indent=1))
        failpoint("open.provenance_written")
        write_atomic(self.config_path, run_to_toml(config))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one trainer; the kernel frees it however the process ends.

        Raises CheckpointError naming the holder when another process trains here, also one on another host, which a
        lock may not reach: its status then shows a sign of life.
        """
        try:
            descriptor = open_regular(self._lock_path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise disk_error(self._lock_path, error) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).rstrip(b"\0").decode(errors="replace") or "unknown"
                raise CheckpointError(
                    f"{self.path} must have one trainer at a time; found another ({holder}). "
                    "Wait for it, stop it, or choose another run folder"
                ) from None
            except OSError as error:
                raise disk_error(self._lock_path, error) from error
            if holder := other_host(self.status()):
                raise CheckpointError(
                    f"{self.path} must have one trainer at a time; found another ({holder}). Stop it: tinylab stop "
                    f"{self.name}; if that host is down, wait {STALE_HEARTBEAT_S:g} s and repeat the same command"
                )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
            with suppress(OSError):
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            self._lock = descriptor
            yield
        finally:
            self._lock = None
            os.close(descriptor)

    def require_place(self) -> None:
        """Raise CheckpointError when the folder that this object holds is no longer at its path.

        Its name may belong to another trainer's folder by then: nothing must be written there.
        """
        if self._lock is None:
            return
        try:
            held = os.path.samestat(os.fstat(self._lock), os.stat(self._lock_path))
        except OSError:
            held = False
        if not held:
            raise CheckpointError(
                f"{self.path} must stay where it is while it is trained; it was removed, moved or replaced. "
                "Nothing more was written there. Put it back and repeat the same command, or start another run"
            )

    def write_status(self, state: str, step: int, **more: Any) -> None:
        """Replace `status.json`: state (`running`, `done`, `stopped`, `failed`), step, and as `new_status` says."""
        content = json.dumps(new_status(state, step, **more))
        self._write(state, lambda: write_atomic(self.status_path, content, sync=False))

    def status(self) -> dict[str, Any]:
        """The last status: `none` where there is no readable one, `lost` (with `reason`) where it no longer holds."""
        return read_status(self.status_path)

    def write_journal(self, event: str, **more: Any) -> None:
        """Append one fsynced line: event, time (Unix s), and what belongs to it."""
        self._write(event, lambda: self.journal_log.write(event, **more))

    def _write(self, what: str, write: Callable[[], None]) -> None:
        """Write; how a run ended may use the room that its lock holds on a full disk."""
        try:
            write()
        except CheckpointError:
            if self._lock is None or what not in LAST_WORDS:
                raise
            os.ftruncate(self._lock, 0)
            write()

    def last_seen(self) -> float | None:
        """When anything was last written by a trainer (Unix s): a step, an event, a sign of life; None if never."""
        status, times = self.status(), [line["time"] for line in self.journal()[-1:]]
        with suppress(OSError):
            times.append(self.metrics_path.lstat().st_mtime)
        times += [status[key] for key in ("heartbeat", "alive") if isinstance(status.get(key), float)]
        return max((t for t in times if 0 < t < 1e15), default=None)

    def journal(self) -> list[dict[str, Any]]:
        """Every complete journal line, oldest first. Raises CheckpointError naming a damaged one."""
        return self.journal_log.records()

    def seal(self) -> dict[str, Any]:
        """Seal the lines of metrics and journal so far: the two seals that `trainer.json` holds."""
        return {"metrics": self.metrics_log.seal(), "journal": self.journal_log.seal()}

    def sync(self) -> None:
        """Flush metrics, journal and their sealed copies to the device; called before a checkpoint commits."""
        self.metrics_log.sync()
        self.journal_log.sync()

    def metrics(self) -> pandas.DataFrame:
        """One row per optimizer step (runs/metrics.py names the columns and units)."""
        import pandas

        return pandas.DataFrame(self.metric_records())

    def metric_records(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` as dictionaries. Raises CheckpointError naming a damaged one."""
        return self.metrics_log.records()

    def checkpoints(self) -> list[Path]:
        """Folders of complete checkpoints (they have a manifest), by step as an integer, oldest first."""
        if not self.checkpoints_path.is_dir():
            return []
        found = [(step_of(p.name), p) for p in self.checkpoints_path.iterdir() if (p / "manifest.json").is_file()]
        return [path for _, path in sorted((s, p) for s, p in found if s is not None)]


def list_runs(root: Path | None = None) -> list[Run]:
    """Every run below `root` (default: `runs/` in the home folder), by name."""
    root = root or home() / "runs"
    return [Run(p.parent) for p in sorted(root.glob("*/config.toml"))] if root.is_dir() else []
