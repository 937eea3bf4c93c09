"""Exit codes, messages and JSON of the command line: what a script and a person rely on."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas
import pytest

import tinylab
from tinylab.cli import command
from tinylab.cli.command import main
from tinylab.cli.output import Answer, table, to_json
from tinylab.config.counts import format_bytes, format_count
from tinylab.config.presets import preset
from tinylab.config.schema import RunConfig
from tinylab.errors import CheckpointError, NothingFoundError, RunStopped
from tinylab.runs.folder import Run


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the message of a command that must fail: nothing on standard output, no traceback."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code != 0
    assert out == ""
    assert err.strip(), "no message"
    assert "Traceback" not in err
    return code, " ".join(err.replace("│", " ").split())


@pytest.fixture
def run(private_home: Path) -> Run:
    """A run folder named `mine` that has not trained yet."""
    made = Run("mine")
    made.create(preset("tiny", 200_000), {})
    return made


BAD_INPUT = [
    (["trian", "r"], 2, "did you mean train?"),
    (["nonesuch"], 2, "the verb must be one of demo, doctor"),
    (["train"], 2, "RUN"),
    (["train", "r", "--presett", "tiny"], 2, "--preset"),
    (["train", "r", "--seed", "one"], 2, "--seed"),
    (["train", "r", "--preset", "tinny"], 2, "did you mean tiny?"),
    (["train", "r", "--preset", "tiny", "--config", "x.toml"], 2, "not both"),
    (["train", "r", "--config", "absent.toml"], 2, "absent.toml"),
    (["train", "r", "--tokens", "many"], 2, "--tokens must be a whole number such as 200000, 200K"),
    (["train", "r", "--save-every", "0"], 2, "saving.every_tokens = 0"),
    (["train", "r", "--set", "optimizer.lrr=1"], 2, "did you mean optimizer.lr?"),
    (["train", "r", "--set", "optimizer.lr=1", "--set", "optimizer.lr=2"], 2, "optimizer.lr is set twice"),
    (["train", "r", "--set", "optimizer.lr=fast"], 2, "optimizer.lr must be a finite number; found 'fast'"),
    (
        ["train", "r", "--set", "stages.0.batch_tokens=1000"],
        2,
        "must be a multiple of model.seq_len (256); nearest valid: 768 or 1024",
    ),
    (["train", "r", "--set", "model.vocab_size=5000"], 2, "model.vocab_size (5000) must equal data.vocab_size (4096)"),
    (["train", "r@1"], 2, "the name of a run must not contain @, which stands before a step in RUN@STEP; found 'r@1'"),
    (["train", "r", "--set", "model.n_head=7"], 2, "nearest valid: 8"),
    (["batch", "r", "--step", "1"], 3, "must hold a run (config.toml); found none"),
    (["runs"], 3, "found none. Start one: tinylab train mine"),
    (["checkpoints", "r"], 3, "must hold a run"),
    (["verify", "r"], 3, "must be a checkpoint, a run or a data folder"),
    (["report"], 2, "report needs RUN… OUT"),
    (["report", "r", "x.pdf"], 2, "OUT ending in .html"),
    (["prepare", "--source", "books"], 2, "--source must look like NAME=CORPUS"),
    (["prepare", "--source", "books=ftp:x"], 2, "must begin with local:, files: or hf:"),
    (["scores"], 2, "STORE"),
    (["compare", "a"], 2, "B"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), BAD_INPUT, ids=lambda v: " ".join(v) if isinstance(v, list) else None
)
def test_bad_input_gives_its_exit_code_and_one_message(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
):
    found_code, found_message = refuse(capsys, *arguments)
    assert found_code == code
    assert message in found_message


def test_a_refused_command_leaves_nothing_behind(private_home: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, _, _ in BAD_INPUT:
        main(arguments)
    assert not private_home.exists()


def test_options_that_change_a_run_are_refused_and_name_every_key(run: Run, capsys: pytest.CaptureFixture[str]):
    code, message = refuse(capsys, "train", "mine", "--tokens", "200K", "--seed", "7", "--set", "optimizer.lr=1e-3")
    assert code == 2
    assert "2 keys differ" in message
    assert "seed = 7 asked, 3407 in the run" in message
    assert "optimizer.lr = 0.001 asked, 0.003 in the run" in message


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, Run]]:
    """What the verb would train, instead of training."""
    import tinylab.training.loop

    calls: list[tuple[object, Run]] = []
    monkeypatch.setattr(tinylab.training.loop, "train", lambda config, run, **_: calls.append((config, run)))
    return calls


@pytest.mark.parametrize("options", [[], ["--tokens", "200K"], ["--preset", "tiny", "--tokens", "200_000"]])
def test_the_same_options_or_none_resume_a_run(run: Run, trained: list[tuple[object, Run]], options: list[str]):
    assert main(["train", "mine", *options]) == 0
    assert trained[0][0] == run.config
    assert trained[0][1].path == run.path


def test_a_new_run_is_the_preset_tiny_with_the_options_put_in(trained: list[tuple[object, Run]], private_home: Path):
    folder = Run("mine")

    def create(config: object, run: Run) -> None:
        run.create(config, {})  # type: ignore[arg-type]

    import tinylab.training.loop

    tinylab.training.loop.train = create  # type: ignore[assignment]  # restored by `trained`
    assert (
        main(["train", "mine", "--tokens", "400K", "--save-every", "40K", "--seed", "5", "--set", "optimizer.lr=1e-3"])
        == 0
    )
    wanted = preset("tiny", 400_000)
    wanted = replace(
        wanted, seed=5, saving=replace(wanted.saving, every_tokens=40_000), optimizer=replace(wanted.optimizer, lr=1e-3)
    )
    assert folder.config == wanted


def test_a_new_run_says_what_it_will_really_train_before_it_starts(
    trained: list[tuple[object, Run]], run: Run, capsys: pytest.CaptureFixture[str]
):
    import tinylab.training.loop

    def create(config: RunConfig, run: Run) -> None:
        print("first step", file=sys.stderr)
        run.create(config, {})

    tinylab.training.loop.train = create  # type: ignore[assignment]  # restored by `trained`
    assert main(["train", "short", "--preset", "demo", "--tokens", "10", "--save-every", "5K"]) == 0
    said = capsys.readouterr().err.partition("first step")[0]
    assert said == (
        "short: 12,288 tokens (10 asked for, rounded up to whole steps), by stage (steps × tokens): basic 1 × 4,096, "
        "cooldown 1 × 8,192; warm-up over 0 tokens, a checkpoint every 5,000 tokens\n"
    )
    assert main(["train", "exact", "--tokens", "40_960"]) == 0
    assert "exact: 40,960 tokens, by stage (steps × tokens): pretrain 10 × 4,096; warm-up" in capsys.readouterr().err
    tinylab.training.loop.train = lambda config, run: None  # type: ignore[assignment]
    assert main(["train", "mine", "--tokens", "200K"]) == 0
    assert "warm-up" not in capsys.readouterr().err, "a run that exists is resumed"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NothingFoundError("nothing here"), 3, "tinylab: nothing here"),
        (CheckpointError("damaged"), 1, "tinylab: damaged"),
        (RunStopped("stopped at step 3", signal.SIGTERM), 143, "tinylab: stopped at step 3"),
        (KeyboardInterrupt(), 130, "stopped by interrupt"),
        (PermissionError(13, "Permission denied", "/some/file"), 1, "/some/file: Permission denied"),
        (OSError(28, "No space left on device", "/some/file"), 1, "/some/file: No space left on device"),
        (
            ModuleNotFoundError("No module named 'papermill'", name="papermill"),
            1,
            "pip install -e '.[notebook,evaluate]'",
        ),
        (TypeError("broken"), 1, "This is a defect of tinylab"),
    ],
)
def test_every_kind_of_error_has_its_exit_code_and_one_message(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail() -> Answer:
        raise error

    monkeypatch.setattr(command, "_verb_function", lambda verb: fail)
    found_code, found_message = refuse(capsys, "runs")
    assert found_code == code
    assert message in found_message
    assert main(["runs", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Answer]], None]:
    """Replaces the verb `runs`."""
    return lambda function: monkeypatch.setattr(command, "_verb_function", lambda name: function)


def test_json_is_one_document_and_everything_else_goes_to_standard_error(
    verb: Callable[[Callable[[], Answer]], None], capsys: pytest.CaptureFixture[str]
):
    def chatty() -> Answer:
        print("a library talks")
        return Answer({"loss": float("nan"), "path": Path("a"), "table": [1, (2,)]}, "text", 1)

    verb(chatty)
    assert main(["runs", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": None, "path": "a", "table": [1, [2]]}
    assert err == "a library talks\n"


def test_a_reader_that_leaves_does_not_change_the_exit_code():
    code = "import sys; from tinylab.cli.command import main; sys.exit(main(['--help']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    assert child.wait() == 0
    assert child.stderr is not None
    assert child.stderr.read() == b""
    child.stderr.close()


def test_interrupt_ends_with_130_and_one_line():
    code = (
        "import signal, sys, time, tinylab.cli.command as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a shell starts with &
        "def wait(): print('ready', flush=True); time.sleep(60)\n"
        "c._verb_function = lambda verb: wait\n"
        "sys.exit(c.main(['runs']))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert err == "tinylab: stopped by interrupt\n"


def test_help_shows_every_verb_on_one_screen(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [v for v in command.VERBS if not any(line.split()[:1] == [v] for line in lines)] == []
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("verb_name", sorted(command.VERBS))
def test_every_verb_explains_its_options(verb_name: str, capsys: pytest.CaptureFixture[str]):
    assert main([verb_name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: tinylab {verb_name}" in out
    assert not re.search(r"None|False|default: \)", out), "a default that says nothing"


def test_the_text_of_an_option_is_one_paragraph_however_its_docstring_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["bench", "--help"]) == 0
    assert "generated tokens. opening: seconds and peak memory" in capsys.readouterr().out


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == tinylab.__version__


def test_the_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "tinylab", "nonesuch"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the verb must be one of" in done.stderr


def test_a_full_disk_under_standard_output_is_no_traceback(capsys: pytest.CaptureFixture[str]):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tinylab", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_tables_align_numbers_to_the_right_and_show_absent_values():
    rows = [{"name": "a", "n": 1, "x": 0.5, "ok": True}, {"name": "longer", "n": 12345, "x": None, "ok": False}]
    assert table(rows).splitlines() == [
        "name         n    x   ok",
        "a            1  0.5  yes",
        "longer  12,345    -   no",
    ]
    assert table([]) == ""


def test_counts_are_powers_of_a_thousand():
    assert [format_bytes(n) for n in (0, 999, 1000, 2_500_000)] == ["0 B", "999 B", "1.0 kB", "2.5 MB"]
    assert [format_count(n) for n in (12, 200_000, 1_605_632, 3e12)] == ["12", "200K", "1.61M", "3T"]


def test_json_of_a_data_frame_is_a_list_of_rows():
    assert json.loads(to_json(pandas.DataFrame({"a": [1, 2], "b": [0.5, None]}))) == [
        {"a": 1, "b": 0.5},
        {"a": 2, "b": None},
    ]


def test_standard_output_is_restored_after_json(
    verb: Callable[[Callable[[], Answer]], None], monkeypatch: pytest.MonkeyPatch
):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    verb(lambda: Answer([1], "one"))
    assert main(["runs", "--json"]) == 0
    assert sys.stdout is stream
    assert json.loads(stream.getvalue()) == [1]


def test_the_plan_of_tinyllama_is_ninety_days(capsys: pytest.CaptureFixture[str]):
    arguments = ["plan", "--preset", "tinyllama-1.1b", "--gpu", "a100-40g", "--gpus", "16", "--tokens", "3T"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == 1_100_048_384
    assert found["tokens_per_s_per_gpu"] == pytest.approx(24_000)
    assert round(found["days"]) == 90
    assert main([*arguments, "--micro-batch", "4"]) == 0
    assert "90.4 days" in capsys.readouterr().out
