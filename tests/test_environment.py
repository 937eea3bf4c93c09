"""environment.yml, pyproject.toml and the constraints say the same, and the tree holds nothing private or produced."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GPU_EXTRAS = ("flash", "xformers")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints(name: str) -> dict[str, list[Requirement]]:
    """Package to its constraints in a file of env/, nested `-c` files included."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "env" / name).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-c "):
            for package, pins in constraints(text.removeprefix("-c ").strip()).items():
                found.setdefault(package, []).extend(pins)
        elif text:
            requirement = Requirement(text)
            found.setdefault(canonical(requirement.name), []).append(requirement)
    return found


def pinned_version(requirements: list[Requirement]) -> Version:
    """The version after `==` in the first constraint that has one."""
    return next(Version(s.version) for r in requirements for s in r.specifier if s.operator == "==")


def declared(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])]
    return [Requirement(line) for line in lines]


def conda() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def pip_lines() -> list[str]:
    return next(d["pip"] for d in conda()["dependencies"] if isinstance(d, dict))


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-cpu.txt"])
def test_every_direct_dependency_is_pinned_to_a_version_that_pyproject_allows(file: str):
    pins = constraints(file)
    for requirement in declared("notebook", "evaluate", "dev"):
        version = pinned_version(pins[canonical(requirement.name)])
        assert version in requirement.specifier, f"{requirement} and {file}: {version}"


def test_gpu_extras_are_pinned_for_gpu_machines_only():
    for requirement in declared(*GPU_EXTRAS)[len(PROJECT["dependencies"]) :]:
        name = canonical(requirement.name)
        assert pinned_version(constraints("constraints.txt")[name]) in requirement.specifier
        assert name not in constraints("constraints-cpu.txt")


def test_both_constraint_files_hold_the_same_pins_but_for_the_build_of_torch_and_the_gpu_extras():
    gpu, cpu = constraints("constraints.txt"), constraints("constraints-cpu.txt")
    assert set(gpu) - set(cpu) == {"flash-attn", "xformers"}
    assert [n for n in cpu if pinned_version(gpu[n]) != pinned_version(cpu[n])] == []
    accepted = {
        build: all(r.specifier.contains(build) for r in gpu["torch"])
        for build in ("2.13.0+cpu", "2.13.0+cu130", "2.13.0")
    }
    assert accepted == {"2.13.0+cpu": False, "2.13.0+cu130": True, "2.13.0": True}
    assert all(r.specifier.contains("2.13.0+cpu") for r in cpu["torch"])


def test_this_environment_has_the_pinned_versions():
    pins = constraints("constraints-cpu.txt")
    differing = {}
    for requirement in declared("notebook", "evaluate", "dev"):
        installed = Version(importlib.metadata.version(requirement.name))
        if Version(installed.public) != pinned_version(pins[canonical(requirement.name)]):
            differing[requirement.name] = str(installed)
    assert differing == {}


def test_the_conda_environment_installs_this_project_with_its_constraints():
    lines = pip_lines()
    assert "-c env/constraints.txt" in lines
    assert "-e .[notebook,evaluate,dev]" in lines
    plain = {canonical(line) for line in lines if not line.startswith("-")}
    assert plain == {"torch", "jupyterlab", "ipywidgets", "matplotlib", "datasets", "papermill"}
    assert plain <= {canonical(r.name) for r in declared("notebook", "evaluate", "dev")}


def test_the_conda_environment_has_a_python_that_the_project_allows():
    python = next(d for d in conda()["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert f">={python.removeprefix('python=')}" == PROJECT["requires-python"]
    assert conda()["channels"] == ["conda-forge", "nodefaults"], "PyTorch has had no conda channel since 2.5"


def test_flash_attn_and_xformers_come_by_the_installer_script_only():
    assert not {"flash-attn", "xformers"} & {canonical(r.name) for r in declared("notebook", "evaluate", "dev")}
    script = (ROOT / "env" / "install-gpu-extras.sh").read_text()
    assert "--no-build-isolation flash-attn" in script
    assert "xformers" in script
    assert "env/install-gpu-extras.sh" in (ROOT / "environment.yml").read_text()


def test_the_license_is_named_and_there():
    assert PROJECT["license"] == "Apache-2.0"
    (name,) = PROJECT["license-files"]
    text = (ROOT / name).read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_commit_hooks_call_tools_of_this_environment_on_files_that_exist():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [r["repo"] for r in repositories] == ["local"], "no network is needed"
    hooks = {hook["id"]: hook for hook in repositories[0]["hooks"]}
    assert set(hooks) == {"strip-notebooks", "ruff", "ruff-format"}
    assert all(hook["language"] == "system" for hook in hooks.values())
    program, script = hooks["strip-notebooks"]["entry"].split()
    assert program == ".venv/bin/python" and (ROOT / script).is_file()


def test_floors_of_the_doctor_are_those_of_pyproject():
    from tinylab.doctor import FLOORS

    known = {canonical(r.name): r for r in declared("notebook", "evaluate", "dev")}
    for name, (floor, _) in FLOORS.items():
        assert Version(floor) in known[name].specifier
        assert Version("0.1") not in known[name].specifier
        assert {Version(s.version) for s in known[name].specifier} == {Version(floor)}, name


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_private_path():
    # Written in pieces, so that this file does not find itself.
    private = re.compile(
        "|".join(
            [
                "/ho" + "me/[a-z]",
                "/Us" + "ers/[A-Za-z]",
                "/ro" + r"ot/\w",
                "/wo" + r"rk/(main|shared)",
                "/op" + "t/(pypi|wheels)",
                "/mnt/" + "[a-z]",
            ]
        )
    )
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in private.finditer(text)]
    assert found == []


@pytest.mark.parametrize("folder", ["data", "runs", "evaluations"])
def test_git_ignores_what_commands_write_into_their_home_folder(folder: str):
    tracked_files()  # skips outside a checkout
    assert subprocess.run(["git", "check-ignore", "-q", f"{folder}/x"], cwd=ROOT).returncode == 0


def test_nothing_produced_is_tracked():
    produced = re.compile(
        r"(^|/)(runs|data|cache|\.venv|__pycache__|\.ipynb_checkpoints)/|\.(pt|pth|safetensors|bin|log)$"
    )
    names = [p.relative_to(ROOT).as_posix() for p in tracked_files()]
    allowed = ("tinylab/data/", "tinylab/runs/", "tests/")
    assert [n for n in names if produced.search(n) and not n.startswith(allowed)] == []


def test_notebooks_are_committed_without_outputs():
    for path in tracked_files():
        if path.suffix == ".ipynb":
            for cell in json.loads(path.read_text())["cells"]:
                assert not cell.get("outputs"), path
                assert cell.get("execution_count") is None, path


TEMPLATES = sorted([*(ROOT / "env").rglob("*.s*"), ROOT / "env" / "Dockerfile", ROOT / "env" / "apptainer.def"])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.name)
def test_files_verbs_and_presets_that_a_template_names_exist(path: Path):
    from tinylab.cli.command import VERBS
    from tinylab.config.presets import PRESETS

    text = path.read_text()
    files = re.findall(r"(?<![/\w.])[\w-]+(?:/[\w*-]+)+\.(?:yaml|sbatch|txt|def|sh)\b", text)
    assert [name for name in files if not list(ROOT.glob(name))] == []
    verbs = re.findall(r"(?:^tinylab|-m tinylab|tinylab\.sif|/lab\" tinylab) ([a-z]+)(?![/\w])", text, re.MULTILINE)
    assert verbs or path.name == "install-gpu-extras.sh"
    assert set(verbs) <= set(VERBS)
    assert set(re.findall(r"--preset (\w+)", text)) <= set(PRESETS)


def test_the_apptainer_image_contains_the_project_and_no_results_of_runs():
    lines = (ROOT / "env" / "apptainer.def").read_text().partition("%files\n")[2].partition("%post")[0].split("\n")
    pairs = [line.split() for line in lines if line.strip()]
    assert {source for source, _ in pairs} == {"pyproject.toml", "README.md", "LICENSE", "env", "notebooks", "tinylab"}
    assert all(target == f"/opt/tinylab/{source}" for source, target in pairs)


SCRIPTS = [*sorted((ROOT / "env").rglob("*.s*")), ROOT / ".ci" / "run", ROOT / ".ci" / "system-packages"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_valid_bash_and_stop_at_the_first_error(path: Path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "set -euo pipefail" in path.read_text()
