"""Verbs `run` and `report`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from tinylab.cli.output import Answer
from tinylab.errors import ConfigError


def run_verb(
    notebook: Annotated[str, arg(metavar="NOTEBOOK")],
    out: Annotated[str, arg(metavar="OUT")],
    /,
    parameter: Annotated[UseAppendAction[tuple[tuple[str, str], ...]], arg(aliases=["-p"], metavar="NAME VALUE")] = (),
    file: Annotated[UseAppendAction[tuple[str, ...]], arg(aliases=["-f"], metavar="YAML")] = (),
    timeout: float | None = None,
) -> Answer:
    """Execute a notebook in a fresh kernel and keep the executed copy. Unknown parameters are refused.

    Args:
        notebook: path, or number or name below notebooks/: 03, loss_curves.
        out: path of the executed notebook, or a folder for it.
        parameter: name and value of one parameter; may be repeated for others.
        file: YAML file of parameters; -p overrides it.
        timeout: seconds that each cell may take.
    """
    from tinylab.notebook.run import collect_parameters, run_notebook

    values = collect_parameters(notebook, [f"{name}={value}" for name, value in parameter], file)
    target = run_notebook(notebook, out, values, timeout=timeout)
    return Answer({"notebook": notebook, "out": str(target), "parameters": values}, str(target))


def report_verb(paths: Annotated[tuple[str, ...], arg(metavar="RUN… OUT")], /) -> Answer:
    """Show runs in one HTML file that opens offline, with every figure in it.

    Args:
        paths: one or more runs, then the file to write (.html).
    """
    *runs, out = paths or ("",)
    if not runs or not out.endswith((".html", ".htm")):
        raise ConfigError(f"report needs RUN… OUT with OUT ending in .html; found {' '.join(paths) or 'nothing'}")
    from tinylab.report import write_report

    write_report(runs, Path(out))
    return Answer({"runs": runs, "out": str(Path(out).absolute())}, str(Path(out).absolute()))
