"""`tinylab run`: find a notebook, check its parameters, execute it, and explain what went wrong."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

from tinylab import errors
from tinylab.errors import ConfigError, NotebookError, RunStopped, TinylabError, did_you_mean
from tinylab.notebook.parameters import Parameter, check_values, read_cell, unknown_parameter
from tinylab.notebook.strict_yaml import read_yaml
from tinylab.runs.folder import home

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
"""The notebooks of the checkout that this package was imported from."""
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def list_notebooks() -> list[Path]:
    """The lab's notebooks, in the order of their numbers."""
    for place in (home() / "notebooks", NOTEBOOKS):
        if found := sorted(place.glob("[0-9][0-9]_*.ipynb")):
            return found
    return []


def find_notebook(name: str | Path) -> Path:
    """A notebook by path, or by the beginning of its name: `03`, `3`, `03_loss`, `loss_curves`.

    Raises ConfigError with the nearest name unless exactly one fits.
    """
    text, path = str(name), Path(name).expanduser()
    if path.is_file():
        return path.absolute()
    known = {p.stem: p for p in list_notebooks()}
    wanted = text.removesuffix(".ipynb")
    number = f"{int(wanted):02d}_" if re.fullmatch(r"[0-9]{1,2}", wanted) else wanted
    fits = [stem for stem in known if stem.startswith(number) or stem[3:].startswith(wanted)]
    if len(fits) == 1 and os.sep not in text:
        return known[fits[0]]
    hint = did_you_mean(Path(wanted).name, known, f"known: {', '.join(known) or 'none'}")
    raise ConfigError(f"a notebook must be a file, or a number or name in notebooks/; found {text!r}; {hint}")


def notebook_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """The parameters of the notebook, from its cell tagged `parameters`; empty if it has none."""
    path = find_notebook(notebook)
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
        source = "".join(tagged[0]["source"]) if tagged else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} must be a Jupyter notebook (nbformat 4); found: {error!r}") from error
    return read_cell(source, f"{path}, parameters cell")


def collect_parameters(
    notebook: str | Path, assignments: list[str] | tuple[str, ...] = (), files: list[str] | tuple[str, ...] = ()
) -> dict[str, Any]:
    """Values from `-f` files and `-p name=value` texts, in the notebook's types; texts override files.

    Raises one ConfigError with every unknown name, repeated name and value of the wrong type.
    """
    declared = notebook_parameters(notebook)
    values: dict[str, Any] = {}
    for file in files:
        values |= check_values(declared, read_yaml(file), str(file))
    seen: set[str] = set()
    problems = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals:
            problems.append(f"a parameter must look like name=value; found {assignment!r}")
        elif name not in declared:
            problems.append(unknown_parameter(declared, name))
        elif name in seen:
            problems.append(f"{name} is given twice; give each parameter once")
        else:
            seen.add(name)
            try:
                values[name] = declared[name].parse(text)
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return values


def run_notebook(
    notebook: str | Path,
    out: str | Path,
    parameters: dict[str, Any] | None = None,
    *,
    timeout: float | None = None,
) -> Path:
    """Execute `notebook` with `parameters` and write it to `out`, a file or a folder; returns the path.

    The kernel runs this Python in the caller's working folder. `timeout` is in seconds per cell. An error of tinylab in
    a cell is raised here again, so that exit codes hold; any other becomes a NotebookError that names the cell.
    A signal raises RunStopped after the notebook is saved. `out` is complete at any moment.
    """
    source = find_notebook(notebook)
    values = check_values(notebook_parameters(source), parameters or {}, source.name)
    target = Path(out).expanduser().absolute()
    if target.suffix != ".ipynb":
        target = target / source.name
    if target == source:
        raise ConfigError(f"OUT must not be the notebook itself ({source}); choose another path")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; choose another OUT") from error
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    from tinylab.notebook.engine import TinylabEngine, register_handler

    register_handler()
    TinylabEngine.stopped_by = None
    failure: BaseException | None = None
    try:
        execute_notebook(
            str(source),
            str(target),
            values,
            engine_name="tinylab",
            kernel_name="python3",
            progress_bar=False,
            cwd=str(Path.cwd()),
            execution_timeout=timeout,
        )
    except PapermillExecutionError as error:
        failure = _cell_failure(error, source, target)
    except DeadKernelError:
        failure = NotebookError(
            f"{source.name}: the kernel must live until the last cell; it died (out of memory?). The cells that ran "
            f"are in {target}, and run folders are intact; repeat the same command"
        )
    except CellTimeoutError:
        failure = NotebookError(f"{source.name}: each cell must end within {timeout} s; one did not. See {target}")
    except KeyboardInterrupt:
        if TinylabEngine.stopped_by is None:
            raise
    if (number := TinylabEngine.stopped_by) is not None:
        message = (
            f"{source.name} was stopped by signal {number:d} and saved in {target}; repeat the command to continue"
        )
        raise RunStopped(message, int(number))
    if failure is not None:
        raise failure
    return target


def _cell_failure(error: Any, source: Path, target: Path) -> TinylabError:
    """The error for a cell that raised: of its own kind if that is tinylab's, else a NotebookError."""
    kind = getattr(errors, error.ename, None)
    message = _ANSI.sub("", str(error.evalue))
    if kind is RunStopped:
        return RunStopped(message, signal.SIGTERM)
    if isinstance(kind, type) and issubclass(kind, TinylabError):
        return kind(message)
    return NotebookError(
        f"{source.name}: every cell must end without an error; cell [{error.exec_count}] raised "
        f"{error.ename}: {message}. The executed notebook with its traceback is {target}"
    )
