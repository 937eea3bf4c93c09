"""REF, the one way to name a model: a folder, RUN, RUN@STEP, RUN@1.5B (tokens), a registry name, a Hub id, a file."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinylab.catalog.series import Checkpoint, choose
from tinylab.errors import CheckpointError, ConfigError, NothingFoundError
from tinylab.runs.folder import Run, step_of
from tinylab.runs.manifest import verify_folder

if TYPE_CHECKING:
    import torch

    from tinylab.config.schema import RunConfig
    from tinylab.data.tokenizer.encode import Tokenizer
    from tinylab.model.transformer import Llama

FORMS = (
    "a model folder (config.json and *.safetensors), RUN, RUN@STEP, RUN@1.5B (tokens), RUN@STAGE, a registry name such "
    "as tinyllama-1.1b@1T, a Hub id with optional @revision, a lit-gpt .pth or a llama2.c .bin"
)
_FILES: dict[str, Literal["litgpt", "llama2c"]] = {".pth": "litgpt", ".bin": "llama2c"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Reference(Checkpoint):
    """A model that was found: a Hugging Face folder on this disk (or one foreign file), and what is known about it."""

    kind: Literal["folder", "run", "registry", "hub", "litgpt", "llama2c"]
    """Which form of REF it was."""
    path: Path
    """The folder, or the `.pth` or `.bin` file."""
    run: Path | None = None
    """Folder of the run that made it."""


def resolve_reference(ref: str | Path | Reference) -> Reference:
    """The model that REF names. A run's checkpoint is checked against its manifest first.

    Raises NothingFoundError for what does not exist (naming what does), CheckpointError for a damaged checkpoint.
    """
    if isinstance(ref, Reference):
        return ref
    text = str(ref)
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix not in _FILES:
            raise NothingFoundError(f"{path.absolute()} is no model that tinylab can name; REF is {FORMS}")
        return Reference(kind=_FILES[path.suffix], path=path.absolute(), label=path.stem)
    if (path / "config.json").is_file() or (path / "lit_model.pth").is_file():
        return _folder(path.absolute())
    name, at, place = text.rpartition("@")
    run = Run(name if at else text)
    if run.exists():
        return _verified(choose(run_references(run), run.name, place)) if at else _newest(run)
    run = Run(text)
    if run.exists():
        return _newest(run)
    if path.exists():
        raise NothingFoundError(f"{path} must be a model or a run; found no config.json and no config.toml in it")
    return _elsewhere(text)


def run_references(run: Run) -> list[Reference]:
    """Every complete checkpoint of a run, oldest first, not verified. Raises NothingFoundError when there is none."""
    config = run.config
    found = [_checkpoint(run, config, path) for path in run.checkpoints()]
    if not found:
        raise NothingFoundError(
            f"{run.path} must hold a committed checkpoint; found none yet. Train it further: tinylab train {run.name}"
        )
    return found


def _checkpoint(run: Run, config: RunConfig, path: Path) -> Reference:
    step = step_of(path.name)
    assert step is not None, path
    stage = config.stages[config.stage_index(min(max(step, 1), config.steps))].name
    label, tokens = f"{run.name}@{step}", config.tokens_at(step)
    return Reference(kind="run", path=path, label=label, step=step, tokens=tokens, stage=stage, run=run.path)


def _verified(reference: Reference) -> Reference:
    problems = verify_folder(reference.path)
    if problems:
        raise CheckpointError(f"{reference.label} must equal its manifest; found damage: " + "; ".join(problems))
    return reference


def _newest(run: Run) -> Reference:
    notes: list[str] = []
    for reference in reversed(run_references(run)):
        try:
            return replace(_verified(reference), notes=tuple(notes))
        except CheckpointError as error:
            notes.append(str(error))
    raise CheckpointError(f"{run.path} must hold an undamaged checkpoint; found none: " + "; ".join(notes))


def _folder(path: Path) -> Reference:
    """A model folder; one inside a run knows its step."""
    run = Run(path.parent.parent)
    if step_of(path.name) is not None and path.parent.name == "checkpoints" and run.exists():
        return _verified(_checkpoint(run, run.config, path))
    kind = "litgpt" if (path / "lit_model.pth").is_file() else "folder"
    return Reference(kind=kind, path=path, label=path.name)


def _elsewhere(text: str) -> Reference:
    """A registry name or a Hub id; anything else was meant as a local name."""
    from tinylab.catalog import hub, milestones

    found = milestones.find(text)
    if found is not None:
        if found.architecture != "llama":
            raise CheckpointError(
                f"{found.label} must be a Llama to open here; it is a {found.architecture}, listed for comparison: "
                f"open {found.repository} at revision {found.revision} with transformers"
            )
        path = hub.fetch(found.repository, found.revision)
        known = {f.name: getattr(found, f.name) for f in fields(Checkpoint)}
        return Reference(kind="registry", path=path, **known)
    name, _, revision = text.partition("@")
    inside_a_folder = Path(name).parent != Path(".") and Path(name).parent.is_dir()
    if text.startswith(("/", ".", "~")) or inside_a_folder or not _HUB_ID.fullmatch(name):
        raise NothingFoundError(f"nothing is called {text}; REF is {FORMS}")
    return Reference(kind="hub", path=hub.fetch(name, revision or None), label=text)


def load_model(
    ref: str | Path | Reference, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Llama:
    """The model that REF names, in eval mode: a call on ids (B, T) returns logits (B, T, V). dtype: absent, as stored.

    Notes of the reference, such as a nearest match, are logged as warnings. Raises ConfigError for a device that torch
    cannot use here; else as `resolve_reference` and `open_weights`.
    """
    import torch

    from tinylab.formats.load import load_weights, open_weights

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device must be one that torch can use here; found {str(device)!r}: {reason}") from error
    reference = resolve_reference(ref)
    for note in reference.notes:
        logging.getLogger(__name__).warning(note)
    return load_weights(open_weights(reference.path), device, dtype)


def load_tokenizer(ref: str | Path | Reference) -> Tokenizer:
    """The tokenizer in a file `tokenizer.model` or `tokenizer.json`, or beside the model that REF names.

    Raises NothingFoundError when there is none, DataError for one that cannot be read.
    """
    from tinylab.data.tokenizer.load import load_tokenizer_file

    if not isinstance(ref, Reference):
        file = Path(ref).expanduser()
        if file.suffix in (".model", ".json") and file.is_file():
            return load_tokenizer_file(file)
    reference = resolve_reference(ref)
    folder = reference.path if reference.path.is_dir() else reference.path.parent
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise NothingFoundError(f"{folder} must hold tokenizer.json or tokenizer.model beside the model; found neither")
    return load_tokenizer_file(folder)
