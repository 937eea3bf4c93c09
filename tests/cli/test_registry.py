"""The verb `checkpoints`: published milestones, the audit, the cache of downloads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tinylab.catalog import hub
from tinylab.cli.command import main
from tinylab.config.architecture import Model
from tinylab.config.presets import tiny
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.model.transformer import Llama
from tinylab.runs.folder import Run, step_name
from tinylab.runs.manifest import MANIFEST

CONFIG = Model(vocab_size=64, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=24, seq_len=16)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, offline."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, object, str]:
    """Exit code, JSON document and messages of a command."""
    capsys.readouterr()
    code = main(["checkpoints", *arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, " ".join(err.split())


def test_the_registry_lists_own_checkpoints_and_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TINYLAB_HOME", str(tmp_path))
    code, published, _ = answer(capsys, "--published")
    assert code == 0 and isinstance(published, list)
    assert answer(capsys)[:2] == (0, published)
    run = Run("mine")
    run.path.mkdir(parents=True)
    run.create(tiny(), {})
    checkpoint = run.checkpoints_path / step_name(7)
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).touch()
    code, rows, _ = answer(capsys)
    assert code == 0 and isinstance(rows, list)
    assert [row["ref"] for row in rows] == ["mine@7", *(row["ref"] for row in published)]
    assert main(["checkpoints"]) == 0
    text = capsys.readouterr().out
    assert "mine@7" in text and "tinyllama-1.1b@1430512" in text
    assert "pythia-1b@0 … pythia-1b@143000, 154 checkpoints" in text


def test_published_milestones_carry_their_own_mean_score_only(capsys: pytest.CaptureFixture[str]):
    code, rows, _ = answer(capsys, "--published")
    assert code == 0 and isinstance(rows, list)
    means = {row["ref"]: row["mean_score"] for row in rows}
    assert means["tinyllama-1.1b@1430512"] == "52.99"
    assert means["pythia-1b@143000"] == "48.30"
    assert [ref for ref, mean in means.items() if mean and ref.startswith("pythia")] == ["pythia-1b@143000"]


def test_published_tokens_stand_beside_their_printed_names(capsys: pytest.CaptureFixture[str]):
    assert main(["checkpoints", "--published"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "1,006,632,960,000  1T, 1007B, 480k" in lines["tinyllama-1.1b@480000"]


def test_a_duplicate_in_a_series_is_named_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [tmp_path / name for name in ("first", "second")]
    model = Llama(CONFIG)
    model.init_weights(0)
    save_weights(model.state_dict(), CONFIG, paths[0])
    write_config(CONFIG, paths[0])
    shutil.copytree(*paths)
    picture = tmp_path / "audit.png"
    code, found, _ = answer(capsys, *map(str, paths), "--audit", "--figure", str(picture))
    assert code == 1 and isinstance(found, dict)
    assert [p["kind"] for p in found["problems"]] == ["duplicate"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figure", "a.png"], "--figure needs --audit"),
        (["--audit", "--cached"], "give one of --published, --audit"),
        (["--audit"], "--audit needs REFs"),
        (["--remove"], "needs REFs"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    code, _, err = answer(capsys, *arguments)
    assert code == 2
    assert message in err


def test_an_empty_cache_is_nothing_found(cache: Path, capsys: pytest.CaptureFixture[str]):
    assert answer(capsys, "--cached")[0] == 3
    code, _, err = answer(capsys, "tinyllama-1.1b@1T", "--remove")
    assert code == 3
    assert "PY007/TinyLlama-1.1B-intermediate-step-480k-1T@main must be in the cache to be removed" in err
    code, _, err = answer(capsys, "tinyllama-1.1b@1T", "--fetch")
    assert code == 3
    assert "PY007/TinyLlama-1.1B-intermediate-step-480k-1T" in err


def test_fetching_the_nearest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(hub, "fetch", lambda *_: tmp_path)
    assert main(["checkpoints", "tinyllama-1.1b@1.3T", "--fetch"]) == 0
    assert "note: tinyllama-1.1b@1.3T: the nearest checkpoint is tinyllama-1.1b@715000" in capsys.readouterr().out


def test_what_is_only_the_nearest_is_not_removed(cache: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = answer(capsys, "tinyllama-1.1b@1.3T", "--remove")
    assert code == 3
    assert "the nearest checkpoint is tinyllama-1.1b@715000" in err and "name exactly what to remove" in err


def test_a_cached_model_is_listed_and_removed(cache: Path, capsys: pytest.CaptureFixture[str]):
    commit = "a" * 40
    home = cache / "models--PY007--TinyLlama-1.1B-intermediate-step-480k-1T"
    (home / "blobs").mkdir(parents=True)
    (home / "blobs" / "b").write_bytes(b"x" * 100)
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "snapshots" / commit / "config.json").symlink_to("../../blobs/b")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    code, rows, _ = answer(capsys, "--cached")
    assert code == 0 and isinstance(rows, list)
    assert [(r["bytes"], r["revisions"]) for r in rows] == [(100, "main")]
    code, rows, _ = answer(capsys, "tinyllama-1.1b@1T", "--remove")
    assert (code, rows) == (0, [{"ref": "tinyllama-1.1b@1T", "bytes": 100}])
    assert answer(capsys, "--cached")[0] == 3
