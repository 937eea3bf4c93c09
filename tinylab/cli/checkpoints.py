"""Verbs `verify`, `convert` and `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from tinylab.cli.output import Answer
from tinylab.errors import EXIT_FAILED, CheckpointError, ConfigError, DataError, NothingFoundError
from tinylab.runs.folder import Run, resolve_run, step_of
from tinylab.runs.manifest import MANIFEST, Progress, verify_folder
from tinylab.runs.regular import read_json
from tinylab.runs.sealed_log import stored_seals


def verify_verb(path: Annotated[str, arg(metavar="PATH")], /) -> Answer:
    """Compare every file with its manifest: a checkpoint, a folder of shards, or a run with all its checkpoints, where
    journal and metrics are compared with what the checkpoints sealed.

    Lists every problem; exit code 1 if there is one, 3 if there is nothing to verify.

    Args:
        path: checkpoint folder, run (or its name below runs/), or data folder.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.exists():
        folder = resolve_run(path)
    try:
        kind, checked, problems = _verify(folder)
    except PermissionError as error:
        raise CheckpointError(
            f"{error.filename or folder} must be readable to be verified; found: {error.strerror}. "
            "Check its permissions"
        ) from error
    document = {"path": str(folder), "kind": kind, "checked": checked, "problems": problems}
    if problems:
        return Answer(document, "\n".join([*problems, f"{folder}: {len(problems)} problems"]), EXIT_FAILED)
    return Answer(document, f"{folder}: {kind}, {checked} verified, no problem")


def _verify(folder: Path) -> tuple[str, int, list[str]]:
    """(kind of folder, manifests or files compared, problems)."""
    if Run(folder).exists():
        return _verify_run(Run(folder))
    if (folder / MANIFEST).is_file() and _is_data(folder):
        from tinylab.data.shards.integrity import read_manifest, verify_shards

        try:
            with _progress(folder) as progress:
                problems = verify_shards(folder, progress=progress)
        except DataError as error:
            return "data", 1, [str(error)]
        return "data", len(read_manifest(folder)["files"]), problems
    if (folder / MANIFEST).is_file() or (folder / "trainer").is_dir():
        return "checkpoint", 1, _checkpoint_problems(folder)
    raise NothingFoundError(
        f"{folder} must be a checkpoint, a run or a data folder (manifest.json or config.toml); found "
        f"{'neither file' if folder.is_dir() else 'no such folder'}. List runs: tinylab runs"
    )


def _is_data(folder: Path) -> bool:
    try:
        return "fingerprint" in read_json(folder / MANIFEST, follow=True)
    except (OSError, CheckpointError, TypeError):
        return (folder / "train").is_dir()


def _checkpoint_problems(folder: Path) -> list[str]:
    try:
        with _progress(folder) as progress:
            return verify_folder(folder, progress=progress)
    except CheckpointError as error:
        return [str(error)]


@contextmanager
def _progress(folder: Path) -> Iterator[Progress]:
    """A bar on standard error, where that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc=f"verify {folder.name}", unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _verify_run(run: Run) -> tuple[str, int, list[str]]:
    """Every checkpoint against its manifest, journal and metrics against their seals, and the configuration."""
    problems: list[str] = []
    try:
        _ = run.config
    except (ConfigError, CheckpointError) as error:
        problems.append(str(error))
    problems += run.journal_log.damage(stored_seals(run.checkpoints(), "journal"))
    problems += run.metrics_log.damage(stored_seals(run.checkpoints(), "metrics"))
    folders = [p for p in run.checkpoints_path.glob("step-*") if p.is_dir()]
    for folder in sorted(folders, key=lambda p: step_of(p.name) or 0):
        problems += _checkpoint_problems(folder)
    return "run", len(folders), problems


def convert_verb(
    source: Annotated[str, arg(metavar="SRC")],
    target: Annotated[str, arg(metavar="DST")],
    /,
    to: Literal["huggingface", "litgpt", "tinyllama"] | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    tokenizer: Path | None = None,
) -> Answer:
    """From one checkpoint format to another; the logits of both are compared before the target appears.

    Args:
        source: any REF: a Hugging Face folder, a run's checkpoint, a lit-gpt .pth, a llama2.c .bin.
        target: folder or file to make; it must not exist.
        to: format of the target; default: tinyllama for a name that ends in .pth, else huggingface.
        dtype: default: as in the source.
        tokenizer: llama2.c's own tokenizer file; default: tokN.bin (N ids) or tokenizer.bin beside the source.
    """
    import torch

    from tinylab.catalog.reference import resolve_reference
    from tinylab.formats.convert import convert

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    reference = resolve_reference(source)
    found = convert(reference.path, target, to, dtype=kinds[dtype] if dtype else None, tokenizer=tokenizer)
    done = replace(found, source=reference.label)
    text = "\n".join([str(done), *(f"note: {note}" for note in reference.notes)])
    return Answer({**asdict(done), "notes": reference.notes}, text)


def generate_verb(
    ref: Annotated[str, arg(metavar="REF")],
    /,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Answer:
    """Text from a model.

    Args:
        ref: model: a folder, RUN (its newest checkpoint), RUN@STEP, RUN@1.5M (tokens), RUN@STAGE, a registry name.
        prompt: text to continue.
        max_new_tokens: length of the continuation, in tokens.
        temperature: 0 takes the likeliest token; above, samples.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that hold this probability together.
        seed: of the sampling.
        device: cpu or cuda.
    """
    import tinylab
    from tinylab.catalog.reference import resolve_reference

    reference = resolve_reference(ref)
    text = tinylab.generate(
        tinylab.load_model(reference, device=device),
        tinylab.load_tokenizer(reference),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    document = {"ref": ref, "model": reference.label, "notes": list(reference.notes), "prompt": prompt, "text": text}
    return Answer(document, text)
