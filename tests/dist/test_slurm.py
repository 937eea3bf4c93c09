"""What is asked of Slurm: the batch file of a run, submitting, states, and Slurm's own words when it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinylab.dist.slurm import TEMPLATES, gpus_per_node, job_state, place_script, render, submit
from tinylab.errors import LaunchError
from tinylab.runs.folder import Run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs alone on the search path, without any of Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def put(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("name", ["single-node.sbatch", "multi-node.sbatch"])
def test_the_files_in_env_are_those_that_launch_fills_in(name: str):
    assert (TEMPLATES / name).samefile(ROOT / "env" / "slurm" / name)


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_batch_file_is_the_template_with_nothing_but_its_settings_changed(nodes: int, tmp_path: Path):
    template = (TEMPLATES / ("single-node.sbatch" if nodes == 1 else "multi-node.sbatch")).read_text().splitlines()
    text = render(Run(tmp_path / "mine"), nodes=nodes, nproc=4, options=["--preset", "tiny"]).splitlines()
    new = [line for line in text[2:-1] if line not in template]  # without the heading and the digest
    assert [line.partition("=")[0] for line in new] == [
        "#SBATCH --job-name",
        *(["#SBATCH --nodes"] if nodes > 1 else []),
        "#SBATCH --gpus-per-node",
        "#SBATCH --cpus-per-task",
        "#SBATCH --output",
        "run",
        "options",
        "nproc",
        "python",
        "export TINYLAB_HOME",
    ]
    assert {"#SBATCH --gpus-per-node=4", "#SBATCH --cpus-per-task=16", "options=(--preset tiny)"} <= set(new)


def test_a_file_that_nobody_edited_is_written_anew(tmp_path: Path):
    run = Run(tmp_path)
    place_script(run, render(run, nodes=2))
    wanted = render(run, nodes=3)
    assert place_script(run, wanted).read_text() == wanted


def test_an_edited_file_is_submitted_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = Run(tmp_path)
    path = place_script(run, render(run, nodes=2))
    edited = path.read_text().replace("#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --account=lab")
    path.write_text(edited)
    assert place_script(run, render(run, nodes=2)).read_text() == edited
    assert "launch.sbatch was edited: submitted as it is" in capsys.readouterr().err


def test_an_edited_file_of_another_command_is_kept_and_the_command_refused(tmp_path: Path):
    run = Run(tmp_path)
    path = place_script(run, render(run, nodes=2))
    path.write_text(edited := path.read_text() + "# mine\n")
    with pytest.raises(LaunchError, match=r"launch\.sbatch must fit this command; it was edited.*Move it away"):
        place_script(run, render(run, nodes=3))
    assert path.read_text() == edited


def test_without_gpus_none_are_asked_for_and_each_process_has_its_cores(tmp_path: Path):
    lines = render(Run(tmp_path / "mine"), nproc=2, gpus=False, threads=3).splitlines()
    assert "#SBATCH --cpus-per-task=6" in lines
    assert not [line for line in lines if line.startswith("#SBATCH --gpus")]


def test_a_missing_sbatch_is_named_with_a_remedy(slurm: Path, tmp_path: Path):
    with pytest.raises(LaunchError, match=r"needs sbatch on the search path; found none.*another mode"):
        submit(tmp_path / "launch.sbatch")


def test_a_refusal_is_shown_in_sbatch_s_own_words(slurm: Path, tmp_path: Path):
    put(slurm, "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(
        LaunchError, match=r"launch\.sbatch.*found exit code 1: sbatch: error: invalid partition specified: gpu\. Edit"
    ):
        submit(tmp_path / "launch.sbatch")


def test_the_job_of_a_cluster_among_several_is_its_number(slurm: Path, tmp_path: Path):
    put(slurm, "sbatch", 'echo "42;east"')
    assert submit(tmp_path / "launch.sbatch") == "42"


def test_a_job_is_submitted_without_the_settings_of_the_job_that_submits_it(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    put(slurm, "sbatch", 'echo "${SLURM_JOB_ID:-none} ${SLURM_CONF:-none}"')
    assert submit(tmp_path / "launch.sbatch") == "none /etc/slurm.conf"


def test_a_job_that_slurm_has_forgotten_has_no_state(slurm: Path):
    put(slurm, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert job_state("5") is None


def test_a_controller_that_does_not_answer_is_not_a_forgotten_job(slurm: Path):
    put(slurm, "scontrol", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(LaunchError, match="Unable to contact slurm controller"):
        job_state("5")


@pytest.mark.parametrize(
    ("printed", "count"), [("(null)", 0), ("gpu:8", 8), ("gpu:a100:4(S:0-1),nic:2", 4), ("(null)\ngpu:2\ngpu:l4:1", 2)]
)
def test_gpus_of_a_node_are_read_from_slurm(slurm: Path, printed: str, count: int):
    put(slurm, "sinfo", f"echo '{printed}'")
    assert gpus_per_node() == count
