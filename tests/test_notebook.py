"""Notebooks run as commands: parameters are strict, outputs whole, errors keep their kind, secrets stay out."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylab.errors import ConfigError, NotebookError, NothingFoundError
from tinylab.notebook.parameters import read_cell
from tinylab.notebook.results import write_result
from tinylab.notebook.run import collect_parameters, find_notebook, list_notebooks, notebook_parameters, run_notebook
from tinylab.notebook.strict_yaml import read_yaml

CELL = """tokens: int = 200_000  # length of the run, tokens
lr: float = 4e-4  # peak
run: str = "tiny"
verbose: bool = False
limit: Optional[int] = None  # items; none: all
runs: list[str] = ["a"]
mix: dict = {"prose": 0.7}"""


def make_notebook(path: Path, *cells: str, parameters: str = CELL) -> Path:
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    tagged = nbformat.v4.new_code_cell(parameters)
    tagged.metadata["tags"] = ["parameters"]
    notebook.cells = [nbformat.v4.new_code_cell("from typing import Optional"), tagged]
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(notebook, path)
    return path


def outputs_of(path: Path) -> str:
    return json.dumps([cell.get("outputs") for cell in json.loads(path.read_text())["cells"]])


def test_the_cell_gives_names_types_and_defaults_in_order():
    found = read_cell(CELL)
    assert list(found) == ["tokens", "lr", "run", "verbose", "limit", "runs", "mix"]
    assert (found["tokens"].default, found["tokens"].base, found["tokens"].optional) == (200_000, "int", False)
    assert found["limit"].optional and found["limit"].base == "int"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tokens = 5", "must be `name: type = literal`"),
        ("import os", "must be `name: type = literal`"),
        ("tokens: int = 2 * 3", "the default must be a literal"),
        ("tokens: int = 5; x: int = 6\nx: int = 7", "a name must be plain and declared once; found 'x'"),
        ("__class__: int = 5", "a name must be plain and declared once; found '__class__'"),
        ("tokens: numpy.int64 = 5", "the type must be one of .*; found 'numpy.int64'"),
        ("tokens: Optional[int = 5", "must be Python"),
        ("tokens: list[dict] = []", r"the type must be one of .*; found 'list\[dict\]'"),
        ("tokens: int = 'five'", "parameter tokens must be a whole number"),
        ("class: int = 5", "must be Python"),
    ],
)
def test_a_cell_that_is_not_typed_literals_is_refused_with_its_line(line: str, message: str):
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        read_cell(line)


def test_texts_become_the_declared_types(tmp_path: Path):
    notebook = make_notebook(tmp_path / "a.ipynb")
    texts = ["tokens=200K", "lr=4e-4", "run=1e5", "verbose=true", "limit=none", 'runs=["x", "y"]', 'mix={"code": 1}']
    values = collect_parameters(notebook, texts)
    assert values == {
        "tokens": 200_000,
        "lr": 4e-4,
        "run": "1e5",
        "verbose": True,
        "limit": None,
        "runs": ["x", "y"],
        "mix": {"code": 1},
    }
    assert collect_parameters(notebook, ["runs=x,y"])["runs"] == ["x", "y"]


def test_every_unknown_name_and_bad_value_is_named_with_the_nearest(tmp_path: Path):
    notebook = make_notebook(tmp_path / "a.ipynb")
    with pytest.raises(ConfigError) as caught:
        collect_parameters(notebook, ["tokns=5", "lr=inf", "verbose=yes", "tokens=1.5"])
    message = str(caught.value)
    assert "unknown parameter 'tokns'; did you mean tokens?" in message
    assert "parameter lr must be a finite number; found 'inf'" in message
    assert "parameter verbose must be true or false; found 'yes'" in message
    assert "parameter tokens must be a whole number" in message


@pytest.mark.parametrize("name", ["a\nimport os", "__class__", "lambda", "x y"])
def test_a_name_that_could_carry_code_is_refused(tmp_path: Path, name: str):
    notebook = make_notebook(tmp_path / "a.ipynb")
    with pytest.raises(ConfigError, match="unknown parameter"):
        run_notebook(notebook, tmp_path / "out.ipynb", {name: 1})
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, object(), {"a": {1: 2}}, b"x"])
def test_only_finite_json_values_pass(tmp_path: Path, value: object):
    notebook = make_notebook(tmp_path / "a.ipynb")
    with pytest.raises(ConfigError, match="must be"):
        run_notebook(notebook, tmp_path / "out.ipynb", {"mix": {"x": value}})


def test_yaml_numbers_are_numbers_and_words_are_text(tmp_path: Path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "lr: 4e-4\nmode: no\ntime: 12:30\ncount: 1_000\nnone: null\nyes: true\nquoted: '5'\nlist: [1, x]\n010: on\n"
    )
    assert read_yaml(path) == {
        "lr": 4e-4,
        "mode": "no",
        "time": "12:30",
        "count": 1000,
        "none": None,
        "yes": True,
        "quoted": "5",
        "list": [1, "x"],
        "010": "on",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"p\.yaml:3: a is given twice"),
        ("a: &x [1]\nb: *x\n", r"p\.yaml:2: aliases are not allowed"),
        ("a: !!python/name:os.system 1\n", r"p\.yaml:1: tags are not allowed"),
        ("a: !!map {b: 1}\n", r"p\.yaml:1: tags are not allowed; found tag:yaml.org,2002:map"),
        ("[a, b]: 1\n", r"p\.yaml:1: keys must be text"),
        ("a: " + "[" * 3000 + "]" * 3000, "is not valid YAML: maximum recursion depth exceeded"),
        ("- 1\n", "must hold `name: value` lines"),
        ("a: [1\n", "is not valid YAML"),
        ("a: 1\n" * 300_000, "must be at most 1000000 bytes"),
    ],
)
def test_yaml_that_hides_something_is_refused_with_its_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


@given(st.text(max_size=80))
def test_any_text_is_a_text_parameter_unchanged(text: str):
    assert read_cell('run: str = "x"')["run"].parse(text) == text


def test_a_notebook_is_found_by_number_prefix_or_path_and_a_typo_names_the_nearest():
    names = [path.stem for path in list_notebooks()]
    assert find_notebook("3").stem == find_notebook("03").stem == find_notebook("loss_curves").stem == "03_loss_curves"
    assert find_notebook(str(find_notebook("03"))).stem == "03_loss_curves" and names == sorted(names)
    with pytest.raises(ConfigError, match="did you mean 03_loss_curves"):
        find_notebook("03_lost_curves")


def test_a_run_injects_values_writes_beside_out_and_joins_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2-hunter2")
    source = make_notebook(
        tmp_path / "a.ipynb",
        "import os\nfor i in range(5): print(tokens, i, flush=True)\nprint(os.environ['TINYLAB_EXECUTOR'])",
        "print(os.environ['HF_TOKEN'], 'hf_' + 'A' * 34)",
        "from tinylab.notebook import write_result\nwrite_result('a', tokens=tokens, bad=float('nan')).name",
        "import sys; print(sys.executable, os.getcwd())",
    )
    out = run_notebook(source, tmp_path / "deep" / "b.ipynb", {"tokens": 7})
    cells = json.loads(out.read_text())["cells"]
    injected = [c for c in cells if "injected-parameters" in c["metadata"].get("tags", [])]
    assert "".join(injected[0]["source"]).splitlines()[1:] == ["tokens = 7"]
    text = outputs_of(out)
    assert [len(c["outputs"]) for c in cells if "range(5)" in "".join(c["source"])] == [1]
    assert "7 4" in text and "papermill" in text and sys.executable in text and os.getcwd() in text
    assert "hunter2" not in text and "hf_AAAA" not in text and "***" in text
    assert json.loads((tmp_path / "deep" / "b.result.json").read_text()) == {"notebook": "a", "tokens": 7, "bad": None}
    assert sorted(p.name for p in out.parent.iterdir()) == ["b.ipynb", "b.result.json"]
    assert "TINYLAB_EXECUTOR" not in os.environ


@pytest.mark.parametrize(
    ("cell", "kind", "message"),
    [
        ("from tinylab.errors import ConfigError\nraise ConfigError('must be even')", ConfigError, "^must be even$"),
        ("from tinylab.runs.folder import Run\nRun('nowhere').require()", NothingFoundError, "must hold a run"),
        ("1 / 0", NotebookError, r"cell \[3\] raised ZeroDivisionError: division by zero.*b\.ipynb"),
        ("import os; os._exit(9)", NotebookError, "the kernel must live until the last cell"),
    ],
)
def test_an_error_in_a_cell_keeps_its_kind_and_the_executed_copy(tmp_path: Path, cell: str, kind: type, message: str):
    source = make_notebook(tmp_path / "a.ipynb", cell)
    with pytest.raises(kind, match=message):
        run_notebook(source, tmp_path / "b.ipynb")
    assert nbformat.read(tmp_path / "b.ipynb", 4).cells


def test_a_cell_of_one_line_is_python_and_no_command_of_ipython(tmp_path: Path):
    source = make_notebook(tmp_path / "a.ipynb", "print(run.upper())", parameters='run: str = "x"')
    assert "X" in outputs_of(run_notebook(source, tmp_path / "out.ipynb"))


def test_a_notebook_of_a_hundred_thousand_brackets_is_one_message(tmp_path: Path):
    (tmp_path / "deep.ipynb").write_text('{"cells": ' + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"deep\.ipynb must be a Jupyter notebook"):
        notebook_parameters(tmp_path / "deep.ipynb")


def test_kernels_of_one_folder_talk_through_sockets_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else two notebooks started at the same moment may take the same ones, and both wait for ever."""
    monkeypatch.chdir(tmp_path)
    cell = "import json, ipykernel\nprint(json.load(open(ipykernel.get_connection_file()))['ip'])"
    source = make_notebook(tmp_path / "a.ipynb", cell)
    copies = [run_notebook(source, tmp_path / "out" / name) for name in ("b.ipynb", "c.ipynb")]
    places = [nbformat.read(copy, 4).cells[-1].outputs[0].text.strip() for copy in copies]
    assert len(set(places)) == 2 and all(Path(place).is_absolute() for place in places)
    assert not any(Path(place).parent.exists() for place in places)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ipynb", "out"]


def test_sigterm_interrupts_the_cell_saves_and_exits_143(tmp_path: Path):
    flag, out = tmp_path / "flag", tmp_path / "b.ipynb"
    cell = f"import time\nprint('before', flush=True)\nopen({str(flag)!r}, 'w').close()\ntime.sleep(60)"
    source = make_notebook(tmp_path / "a.ipynb", cell, "print('never')")
    command = [sys.executable, "-m", "tinylab", "run", str(source), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 90
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert f"a.ipynb was stopped by signal 15 and saved in {out}; repeat the command to continue" in errors
    text = outputs_of(out)
    assert "before" in text and "KeyboardInterrupt" in text and "never" not in text


def test_each_save_of_a_running_notebook_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import papermill  # noqa: F401  # before the engine, which papermill loads itself

    from tinylab.errors import CheckpointError
    from tinylab.notebook.engine import AtomicHandler

    seen = []
    write = AtomicHandler.write
    monkeypatch.setattr(AtomicHandler, "write", lambda self, text, path: seen.append(path) or write(self, text, path))
    out = run_notebook(make_notebook(tmp_path / "a.ipynb", "1", "2"), tmp_path / "b.ipynb")
    assert len(seen) >= 8 and set(seen) == {str(out)}  # a save before and after each of four cells
    whole = out.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left"):
        AtomicHandler().write("{", str(out))
    assert out.read_bytes() == whole and not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize("first", ["import papermill", "from tinylab.notebook import TinylabEngine", "import tinylab"])
def test_papermill_finds_the_engine_whichever_is_imported_first(first: str):
    code = (
        f"{first}; from papermill.engines import papermill_engines as e;"
        "from tinylab.notebook import TinylabEngine as t;"
        "assert e.get_engine('tinylab') is t"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_papermill_sees_the_same_parameters_as_we_do():
    from papermill import inspect_notebook

    for path in list_notebooks():
        assert list(inspect_notebook(str(path))) == list(notebook_parameters(path)), path


def test_a_result_holds_plain_values_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import numpy as np

    monkeypatch.setenv("TINYLAB_NOTEBOOK_OUT", str(tmp_path / "x.ipynb"))
    path = write_result("x", a=np.float32(1.5), b=np.arange(2), c={1: math.inf}, d=Path("y"), e=(True, None))
    assert json.loads(path.read_text()) == {
        "notebook": "x",
        "a": 1.5,
        "b": [0, 1],
        "c": {"1": None},
        "d": "y",
        "e": [True, None],
    }
