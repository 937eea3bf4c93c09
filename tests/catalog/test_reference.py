"""REF in every form, over a small run: which checkpoint it finds, what it says, what it refuses."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from tinylab.catalog.reference import load_model, load_tokenizer, resolve_reference, run_references
from tinylab.config.architecture import Model
from tinylab.config.presets import tiny
from tinylab.config.schema import Data, RunConfig, Source
from tinylab.config.stages import Schedule, Stage
from tinylab.data.tokenizer.load import load_tokenizer_file, train_tokenizer
from tinylab.errors import CheckpointError, ConfigError, DataError, NothingFoundError
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.formats.litgpt import save_pth
from tinylab.model.transformer import Llama
from tinylab.runs.folder import Run, home, step_name
from tinylab.runs.manifest import commit_folder, temporary_folder

MODEL = Model(vocab_size=40, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=32, seq_len=16)


def _model(seed: int) -> Llama:
    model = Llama(MODEL)
    model.init_weights(seed)
    return model.eval()


def _write(folder: Path, seed: int, **options: int) -> None:
    save_weights(_model(seed).state_dict(), MODEL, folder, **options)
    write_config(MODEL, folder, bos_id=1, eos_id=2)


@pytest.fixture
def run(private_home: Path) -> Run:
    """`small` below runs/, with checkpoints at steps 2, 10 and 12 of two stages."""
    config = RunConfig(
        model=MODEL,
        data=Data(sources=(Source(name="text", corpus="files:*.txt"),), vocab_size=40),
        stages=(
            Stage(name="basic", tokens=1000, batch_tokens=160),
            Stage(name="cooldown", tokens=1600, batch_tokens=320),
        ),
        schedule=Schedule(warmup_tokens=160),
    )
    run = Run(private_home / "runs" / "small")
    run.create(config, {})
    for step in (2, 10, 12):
        target = run.checkpoints_path / step_name(step)
        temporary = temporary_folder(target)
        _write(temporary, step)
        commit_folder(temporary, target)
    return run


def test_a_run_alone_is_its_newest_checkpoint(run):
    for ref in ("small", str(run.path), run.path):
        found = resolve_reference(ref)
        assert (found.label, found.step, found.stage, found.run) == ("small@12", 12, "cooldown", run.path)
        assert found.tokens == 7 * 160 + 5 * 320 and not found.notes


def test_a_plain_integer_is_a_step_and_a_suffix_means_tokens(run):
    assert resolve_reference("small@10").step == 10
    near = resolve_reference("small@0.3K")
    assert near.step == 2 and near.tokens == 320
    assert near.notes == ("small@0.3K: the nearest checkpoint is small@2, after 320 tokens",)
    assert not resolve_reference("small@0.32K").notes
    with pytest.raises(NothingFoundError, match="small has no checkpoint at step 11; it has steps 2, 10, 12"):
        resolve_reference("small@11")
    message = r"small@lots must name a step, tokens such as 1.5T, or a stage \(basic, cooldown\); it has steps 2, 10"
    with pytest.raises(NothingFoundError, match=message):
        resolve_reference("small@lots")


def test_tokens_beyond_the_end_of_a_run_are_refused_like_a_missing_step(run):
    with pytest.raises(NothingFoundError, match="no checkpoint near 99M tokens; the nearest is small@12, after 2,720"):
        resolve_reference("small@99M")
    with pytest.raises(NothingFoundError, match="no checkpoint near 0.1K tokens; the nearest is small@2, after 320"):
        resolve_reference("small@0.1K")
    assert resolve_reference("small@2.9K").step == 12  # 2,720 tokens: within a tenth, as people round
    assert resolve_reference("small@last").step == 12


def test_a_stage_is_its_last_checkpoint(run):
    assert [resolve_reference(f"small@{stage}").step for stage in ("basic", "cooldown")] == [2, 12]


def test_a_nearest_match_is_said_when_the_model_is_opened(run, caplog):
    load_model("small@0.32K")
    assert not caplog.messages
    load_model("small@0.3K")
    assert caplog.messages == ["small@0.3K: the nearest checkpoint is small@2, after 320 tokens"]


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_wrong_usage(run, device):
    with pytest.raises(ConfigError, match=f"device must be one that torch can use here; found '{device}': "):
        load_model("small", device=device)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_note_and_refused_by_name(run):
    damaged = run.checkpoints()[-1] / "config.json"
    damaged.write_text(damaged.read_text() + " ")
    found = resolve_reference("small")
    assert found.step == 10 and "small@12 must equal its manifest" in found.notes[0] and "config.json" in found.notes[0]
    with pytest.raises(CheckpointError, match=r"small@12 must equal its manifest.*config.json"):
        resolve_reference("small@12")


def test_a_checkpoint_folder_of_a_run_knows_its_step(run):
    found = resolve_reference(run.checkpoints()[0])
    assert (found.label, found.step, found.stage) == ("small@2", 2, "basic")
    assert [r.step for r in run_references(run)] == [2, 10, 12]


def test_model_folder_and_lit_gpt_file_give_the_same_model(tmp_path):
    _write(tmp_path / "plain", 5)
    save_pth(_model(5), tmp_path / "lit_model.pth")
    (tmp_path / "lit_config.json").write_text("{}")
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = _model(5)(ids)
    assert torch.equal(load_model(tmp_path / "plain")(ids), expected)
    assert resolve_reference(tmp_path / "plain").label == "plain"
    assert resolve_reference(tmp_path / "lit_model.pth").kind == "litgpt"


@pytest.mark.parametrize("ref", ["nothing", "small/else/deep", "./nowhere", "/no/such/folder"])
def test_what_does_not_exist_names_every_form_of_ref(ref, private_home):
    with pytest.raises(NothingFoundError, match=r"nothing is called .*RUN@1.5B \(tokens\).*Hub id"):
        resolve_reference(ref)


def test_a_mistyped_run_below_runs_never_asks_the_hub(run, monkeypatch):
    monkeypatch.chdir(home())
    with pytest.raises(NothingFoundError, match="nothing is called runs/smal"):
        resolve_reference("runs/smal")


def test_a_long_run_names_the_steps_around_the_one_that_it_lacks(private_home):
    run = Run(private_home / "runs" / "long")
    run.create(tiny(), {})
    for step in range(10, 310, 10):
        (run.checkpoints_path / step_name(step)).mkdir(parents=True)
        (run.checkpoints_path / step_name(step) / "manifest.json").write_text("{}")
    with pytest.raises(NothingFoundError, match="at step 64; it has steps 10, 60, 70, 300 and 26 more"):
        resolve_reference("long@64")


def test_the_checkpoints_of_a_run_are_in_the_order_of_their_steps(tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    config = tiny()
    run.create(config, {})
    for step in (2, 10, 9):
        folder = run.checkpoints_path / step_name(step)
        (folder / "trainer").mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    (run.checkpoints_path / "step-00000011").mkdir()  # no manifest: a save that never ended
    found = run_references(run)
    assert [(r.step, r.tokens) for r in found] == [(s, config.tokens_at(s)) for s in (2, 9, 10)]
    assert all(r.stage == config.stages[0].name and r.path.is_dir() for r in found)


def test_a_tokenizer_is_named_by_its_file_too(tmp_path):
    text = (Path(sysconfig.get_paths()["stdlib"]) / "json" / "decoder.py").read_text()
    train_tokenizer([text], 400).save(tmp_path)
    wanted = load_tokenizer_file(tmp_path).hash
    for name in ("tokenizer.model", "tokenizer.json"):
        assert load_tokenizer(tmp_path / name).hash == wanted
        assert load_tokenizer(str(tmp_path / name)).hash == wanted
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json must be JSON"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_run_without_checkpoint_a_foreign_file_and_a_missing_tokenizer_are_named(run, tmp_path):
    empty = Run(tmp_path / "runs" / "empty")
    empty.create(run.config, {})
    with pytest.raises(NothingFoundError, match="must hold a committed checkpoint; found none yet"):
        resolve_reference(empty.path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(NothingFoundError, match=r"model.gguf is no model that tinylab can name"):
        resolve_reference(tmp_path / "model.gguf")
    with pytest.raises(NothingFoundError, match=r"must hold tokenizer.json or tokenizer.model beside the model"):
        load_tokenizer("small@2")
