"""The papermill engine `tinylab`, and the handler that writes executed notebooks atomically.

Import papermill first: it loads this module by its entry point, through `tinylab.notebook`.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine
from papermill.iorw import LocalHandler, papermill_io
from papermill.log import logger
from papermill.utils import merge_kwargs, remove_args
from traitlets.config import Config

from tinylab.notebook.results import EXECUTOR_VARIABLE, OUT_VARIABLE
from tinylab.runs.durable import write_atomic
from tinylab.runs.folder import home
from tinylab.runs.secrets import remove_secrets


class AtomicHandler(LocalHandler):
    """papermill's local files, written under a temporary name, fsynced and renamed, without secrets."""

    def write(self, buf: str, path: str) -> None:
        """Write the notebook `buf` to `path`: readers see the old file or the new one, never a part."""
        write_atomic(Path(path), remove_secrets(buf))


class InterpreterKernel(AsyncKernelManager):
    """A kernel in the Python of this process, whatever kernelspec of the same name is installed elsewhere."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """The kernelspec of this interpreter."""
        return KernelSpec(**get_kernel_dict())


class Client(PapermillNotebookClient):
    """papermill's client, which ends after `stop`: inside a cell or between two."""

    stopped_by: int | None = None

    def stop(self, number: int) -> None:
        """Interrupt the running cell as Ctrl-C does in its kernel, and start no other."""
        self.stopped_by = number
        pid = getattr(getattr(self.km, "provisioner", None), "pid", None)
        if pid:
            os.kill(pid, signal.SIGINT)

    def execute_cell(self, cell: Any, cell_index: int, *args: Any, **kwargs: Any) -> Any:
        """Execute one cell, unless a signal asked to stop."""
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        return super().execute_cell(cell, cell_index, *args, **kwargs)


class TinylabEngine(NBClientEngine):
    """nbclient with joined streams, the executor variable, and signals passed on to the kernel.

    `papermill --engine tinylab …` does the same, without strict parameters and our exit codes.
    """

    stopped_by: int | None = None
    """The signal that ended the last notebook, if any."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        log_output: bool = False,
        stdout_file: Any = None,
        stderr_file: Any = None,
        start_timeout: int = 60,
        execution_timeout: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the cells of `nb_man.nb` in order."""
        cls.stopped_by = None
        out = os.path.abspath(nb_man.output_path) if nb_man.output_path else ""
        register_handler()
        final = merge_kwargs(
            remove_args(["timeout", "startup_timeout", "input_path"], **kwargs),
            timeout=execution_timeout or kwargs.get("timeout"),
            startup_timeout=start_timeout,
            kernel_name=kernel_name,
            log=logger,
            log_output=log_output,
            stdout_file=stdout_file,
            stderr_file=stderr_file,
            coalesce_streams=True,
        )
        variables = {EXECUTOR_VARIABLE: "papermill", OUT_VARIABLE: out, "TINYLAB_HOME": str(home())}
        with TemporaryDirectory(prefix="tinylab-kernel-") as folder:
            if kernel_name in ("python3", "tinylab"):
                # In a folder of its own: jupyter_client looks for free ports, and for free names of sockets in the
                # working folder, and binds them later; kernels that started at the same time would collide.
                places = {"connection_file": f"{folder}/kernel.json", "ip": f"{folder}/socket"}
                config = Config({InterpreterKernel.__name__: {"transport": "ipc", **places}})
                final |= {"kernel_manager_class": InterpreterKernel, "config": config}
                # Otherwise IPython takes a cell of one line, `run: str = "x"`, for its command %run.
                final["extra_arguments"] = ["--InteractiveShell.automagic=False"]
            client = Client(nb_man, **final)
            with _signals(client):
                try:
                    return client.execute(env=os.environ | variables)
                finally:
                    cls.stopped_by = client.stopped_by


def register_handler() -> None:
    """Let papermill write local absolute paths through AtomicHandler."""
    if not isinstance(papermill_io.get_handler("/"), AtomicHandler):
        papermill_io.register("/", AtomicHandler())


@contextmanager
def _signals(client: Client) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 stop the client; a second one has its usual effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def handle(number: int, frame: Any) -> None:
        client.stop(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
