"""The verbs on one real, very small run: what they print is what lies in its folder."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tinylab.cli.command import main
from tinylab.runs.folder import Run
from tinylab.runs.manifest import read_manifest

CONFIG = """
seed = 1
[model]
vocab_size = 512
n_layer = 2
d_model = 32
n_head = 2
n_kv_head = 1
d_ff = 64
seq_len = 32
[data]
vocab_size = 512
validation_fraction = 0.1
path = "{folder}/prepared"
[[data.sources]]
name = "code"
corpus = "files:{library}/json/*.py"
[[stages]]
name = "only"
tokens = 4096
batch_tokens = 256
[schedule]
warmup_tokens = 256
[parallel]
threads = 1
precision = "fp32"
[saving]
every_tokens = 2048
[validation]
every_tokens = 2048
sequences = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run.toml` and the run `mine` made from it by `tinylab train`."""
    place = tmp_path_factory.mktemp("verbs")
    library = sysconfig.get_paths()["stdlib"]
    (place / "run.toml").write_text(CONFIG.format(folder=place, library=library))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLAB_HOME", str(place))
        assert main(["train", str(place / "mine"), "--config", str(place / "run.toml")]) == 0
    return place


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """The JSON document of a verb."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_train_leaves_one_line_of_metrics_per_step_and_says_where_the_run_stands(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    records = Run(folder / "mine").metric_records()
    assert [r["step"] for r in records] == list(range(1, 17))
    summary = answer(capsys, "train", str(folder / "mine"))
    assert (summary["state"], summary["step"], summary["tokens"]) == ("done", 16, 4096)
    assert summary["loss"] == records[-1]["loss"]


def test_the_same_command_on_a_finished_run_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    run = Run(folder / "mine")
    before = run.metrics_path.read_bytes(), [p.name for p in run.checkpoints()]
    assert main(["train", str(run.path), "--config", str(folder / "run.toml")]) == 0
    assert (run.metrics_path.read_bytes(), [p.name for p in run.checkpoints()]) == before


def test_runs_lists_the_run(folder: Path, capsys: pytest.CaptureFixture[str]):
    rows = answer(capsys, "runs", str(folder))
    assert [(r["run"], r["state"], r["step"], r["steps"]) for r in rows] == [("mine", "done", 16, 16)]


def test_a_run_that_cannot_be_read_does_not_hide_the_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(folder / "mine", tmp_path / "good")
    shutil.copytree(folder / "mine", tmp_path / "bad")
    (tmp_path / "bad" / "metrics.jsonl").write_text("damaged\n")
    rows = answer(capsys, "runs", str(tmp_path))
    assert [(r["run"], r["state"]) for r in rows] == [("bad", "unreadable"), ("good", "done")]
    assert "metrics.jsonl, line 1" in rows[0]["error"]


def test_checkpoints_lists_every_committed_folder_with_its_size(folder: Path, capsys: pytest.CaptureFixture[str]):
    run = Run(folder / "mine")
    rows = answer(capsys, "checkpoints", str(run.path))
    assert [r["step"] for r in rows] == [1, 2, 4, 8, 16]
    assert [r["tokens"] for r in rows] == [256, 512, 1024, 2048, 4096]
    assert {r["stage"] for r in rows} == {"only"}
    assert all(r["optimizer"] for r in rows)
    manifest = run.checkpoints()[0] / "manifest.json"
    recorded = sum(f["bytes"] for f in read_manifest(manifest.parent).values())
    assert rows[0]["bytes"] == recorded + manifest.stat().st_size


@pytest.mark.parametrize(
    ("name", "kind"), [("mine", "run"), ("prepared", "data"), ("mine/checkpoints/step-00000016", "checkpoint")]
)
def test_verify_finds_no_problem_in_undamaged_folders(
    folder: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
):
    found = answer(capsys, "verify", str(folder / name))
    assert found["kind"] == kind
    assert found["problems"] == []
    assert found["checked"] > 0


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_verify_names_every_damaged_file_of_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(folder / "mine", tmp_path / "mine")
    checkpoints = Run(tmp_path / "mine").checkpoints()
    weights = [next(c.glob("model*.safetensors")) for c in checkpoints[:2]]
    for path in weights:
        flip_last_byte(path)
    (checkpoints[2] / "config.json").unlink()
    found = answer(capsys, "verify", str(tmp_path / "mine"), code=1)
    assert len(found["problems"]) == 3
    for path in (*weights, checkpoints[2] / "config.json"):
        assert any(str(path) in problem for problem in found["problems"])


def test_verify_compares_metrics_and_journal_with_what_the_checkpoints_sealed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Run(shutil.copytree(folder / "mine", tmp_path / "mine"))
    lines = run.metrics_path.read_bytes().splitlines(keepends=True)
    run.metrics_path.write_bytes(b"".join(lines[:6] + lines[7:]))
    run.journal_path.write_bytes(run.journal_path.read_bytes().replace(b'"stage": "only"', b'"stage": "lone"'))
    found = answer(capsys, "verify", str(run.path), code=1)
    assert found["problems"] == [
        f"{run.journal_path}: 1 of {journal_lines(run)} sealed lines missing or altered, the first at line 2",
        f"{run.metrics_path}: 1 of 16 sealed lines missing or altered, the first at line 7",
    ]


def journal_lines(run: Run) -> int:
    return json.loads((run.checkpoints()[-1] / "trainer" / "trainer.json").read_text())["journal"]["lines"]


def test_verify_names_a_damaged_shard(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(folder / "prepared", tmp_path / "prepared")
    shard = next((tmp_path / "prepared" / "train").rglob("*.bin"))
    flip_last_byte(shard)
    found = answer(capsys, "verify", str(tmp_path / "prepared"), code=1)
    assert any(shard.name in problem for problem in found["problems"])


@pytest.mark.parametrize("name", ["prepared", "mine/checkpoints/step-00000016", "mine"])
def test_verify_names_extra_files_empty_directories_and_links_to_the_same_bytes(
    folder: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place = Path(shutil.copytree(folder / name, tmp_path / Path(name).name, symlinks=True))
    inside = place / "checkpoints" / "step-00000016" if name == "mine" else place
    (inside / "extra.txt").write_text("x")
    (inside / "hollow").mkdir()
    file = inside / ("tokenizer/tokenizer.json" if name == "prepared" else "config.json")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert sorted(answer(capsys, "verify", str(place), code=1)["problems"]) == sorted(
        [
            f"{inside / 'extra.txt'}: file that the manifest does not list",
            f"{inside / 'hollow'}: empty directory that the manifest does not list",
            f"{file}: symbolic link in place of a file",
        ]
    )


def test_batch_shows_the_samples_of_a_step_and_their_documents(folder: Path, capsys: pytest.CaptureFixture[str]):
    found = answer(capsys, "batch", str(folder / "mine"), "--step", "3", "--text")
    assert [s["n"] for s in found["samples"]] == list(range(16, 24))
    assert all(d["origin"].endswith(".py") for s in found["samples"] for d in s["documents"])
    assert all(s["text"] for s in found["samples"])
    assert main(["batch", str(folder / "mine"), "--step", "3", "--limit", "1"]) == 0
    text = capsys.readouterr().out
    assert "step 3, stage only: 8 samples of 32 tokens" in text
    assert text.count("sample ") == 1


def test_a_step_outside_the_run_is_wrong_usage(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["batch", str(folder / "mine"), "--step", "17"]) == 2
    assert "step must lie between 1 and 16" in capsys.readouterr().err


def test_prepare_says_what_was_made_and_finds_it_done(folder: Path, capsys: pytest.CaptureFixture[str]):
    found = answer(capsys, "prepare", "--config", str(folder / "run.toml"))
    manifest = json.loads((folder / "prepared" / "manifest.json").read_text())
    assert found["fingerprint"] == manifest["fingerprint"]
    assert {r["split"] for r in found["splits"]} == {"train", "validation"}


def test_generate_gives_the_same_text_for_the_same_seed(folder: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [
        "generate",
        str(folder / "mine"),
        "--prompt",
        "def ",
        "--max-new-tokens",
        "8",
        "--temperature",
        "1",
        "--seed",
        "3",
    ]
    assert answer(capsys, *arguments)["text"] == answer(capsys, *arguments)["text"]


def test_convert_takes_a_ref_and_says_a_nearest_match(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ref, note = f"{folder / 'mine'}@0.5K", "mine@0.5K: the nearest checkpoint is mine@2, after 512 tokens"
    found = answer(capsys, "convert", ref, str(tmp_path / "m.pth"))
    assert (found["source"], found["notes"], found["max_difference"]) == ("mine@2", [note], 0.0)
    assert main(["convert", ref, str(tmp_path / "copy")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"mine@2 → {tmp_path / 'copy'}") and out.endswith(f"\nnote: {note}\n")


def test_a_missing_model_is_refused_with_a_message(folder: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["generate", str(folder / "none"), "--prompt", "x"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert str(folder / "none") in err


def test_a_truncated_newest_checkpoint_is_passed_over_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(folder / "mine", tmp_path / "mine")
    newest = next(Run(tmp_path / "mine").checkpoints()[-1].glob("model*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:100])
    found = answer(capsys, "generate", str(tmp_path / "mine"), "--prompt", "def ", "--max-new-tokens", "2")
    assert found["model"] == "mine@8"
    assert any(str(newest) in note for note in found["notes"])
