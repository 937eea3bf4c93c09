"""Published checkpoints and own ones, by name, step, tokens or stage. Standard library only.

`tinyllama-1.1b@1T`, `@480000` (a step), `@480k`, `@1007B` (as printed), `@1.4T` (nearest, with a note), `@cooldown`
(stage). Tokens follow from the step; what was printed is kept as a spelling that finds it.
Sources: jzhang38/TinyLlama:README.md, EVAL.md and pretrain/tinyllama.py; the model cards of TinyLlama/TinyLlama_v1.1
and its variants; EleutherAI/pythia:README.md.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from tinylab.config.counts import parse_count
from tinylab.config.schema import STEP_TOKENS
from tinylab.errors import CheckpointError, ConfigError, NothingFoundError, did_you_mean
from tinylab.runs.folder import Run, list_runs, step_of


@dataclass(frozen=True, kw_only=True)
class Milestone:
    """One checkpoint of a series."""

    series: str
    """`tinyllama-1.1b`, `tinyllama-1.1b-v1.1`, `pythia-1b`, or the name of an own run."""
    step: int | None
    """Optimizer steps before it; None where it was never published."""
    tokens: int
    """Tokens before it: step times tokens per step, or as printed where no step is known."""
    repository: str | None = None
    """Hugging Face Hub id; None for own runs."""
    revision: str = "main"
    """Branch or tag of the repository."""
    path: Path | None = None
    """Folder of an own checkpoint; None for published ones."""
    printed: tuple[str, ...] = ()
    """How its authors write it: `1T`, `1007B`, `480k`."""
    stage: str | None = None
    """Stage of the run that it ends or lies in."""
    architecture: str = "llama"
    """`llama` opens here; any other is listed for comparison and cannot be loaded."""
    has_optimizer: bool = False
    """Whether training can go on from it."""
    note: str | None = None
    """What the user should know: a nearest match, an assumption."""

    @property
    def name(self) -> str:
        """The REF that names exactly this one."""
        return f"{self.series}@{self.step if self.step is not None else self.printed[0]}"


def _tinyllama() -> list[Milestone]:
    rows = [
        (50_000, "PY007/TinyLlama-1.1B-step-50K-105b", ("105B", "104B", "103B", "50k")),
        (240_000, "PY007/TinyLlama-1.1B-intermediate-step-240k-503b", ("503B", "240k")),
        (480_000, "PY007/TinyLlama-1.1B-intermediate-step-480k-1T", ("1T", "1007B", "480k")),
        (715_000, "PY007/TinyLlama-1.1B-intermediate-step-715k-1.5T", ("1.5T", "715k")),
        (955_000, "TinyLlama/TinyLlama-1.1B-intermediate-step-955k-token-2T", ("2T", "955k")),
        (1_195_000, "TinyLlama/TinyLlama-1.1B-intermediate-step-1195k-token-2.5T", ("2.5T", "1195k")),
        (1_430_512, "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", ("3T", "1431k")),
    ]
    return [
        Milestone(
            series="tinyllama-1.1b",
            step=step,
            tokens=step * STEP_TOKENS,
            repository=repository,
            printed=printed,
            stage="pretrain",
        )
        for step, repository, printed in rows
    ]


def _tinyllama_v1_1() -> list[Milestone]:
    variants = {"": "", "-math_code": "_math_code", "-chinese": "_chinese"}
    return [
        Milestone(
            series=f"tinyllama-1.1b-v1.1{ours}",
            step=None,
            tokens=2_000_000_000_000,
            repository=f"TinyLlama/TinyLlama_v1.1{theirs}",
            printed=("2T",),
            stage="cooldown",
            note="tokens as printed: the step and the exact batch were not published",
        )
        for ours, theirs in variants.items()
    ]


def _pythia() -> list[Milestone]:
    steps = [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]
    return [
        Milestone(
            series="pythia-1b",
            step=step,
            tokens=step * STEP_TOKENS,
            repository="EleutherAI/pythia-1b",
            revision=f"step{step}",
            printed=(f"step{step}", *(("300B",) if step == 143_000 else ())),
            stage="pretrain",
            architecture="gpt_neox",
        )
        for step in steps
    ]


PUBLISHED: tuple[Milestone, ...] = (*_tinyllama(), *_tinyllama_v1_1(), *_pythia())
"""Every published checkpoint known here, by series and tokens. More steps of TinyLlama are branches of
`TinyLlama/tinyLlama-intermediate-checkpoints`: name them by Hub id and revision."""
_ALIASES = {
    "tinyllama": "tinyllama-1.1b",
    "tinyllama-1.1b-v1.0": "tinyllama-1.1b",
    "tinyllama-v1.1": "tinyllama-1.1b-v1.1",
    "pythia-1.0b": "pythia-1b",
}


def list_milestones(root: Path | None = None, series: str | None = None) -> list[Milestone]:
    """Published checkpoints, then those of every run below `root` (default: `runs/` in the home folder).

    series: only this one. Raises NothingFoundError for a series that does not exist, naming the nearest.
    """
    known = [*PUBLISHED, *own(root)]
    if series is None:
        return known
    name = _ALIASES.get(series.lower(), series)
    found = [m for m in known if m.series.lower() == name.lower()]
    if not found:
        names = list(dict.fromkeys(m.series for m in known))
        hint = did_you_mean(name, names, f"known: {', '.join(names)}")
        raise NothingFoundError(f"no series of checkpoints is called {series}; {hint}")
    return found


def own(root: Path | None = None) -> list[Milestone]:
    """Every complete checkpoint of every run below `root`, by run and step. A run that cannot be read is logged."""
    found: list[Milestone] = []
    for run in list_runs(root):
        try:
            found += _of_run(run)
        except (ConfigError, CheckpointError) as error:
            logging.getLogger(__name__).warning("left out of the list of checkpoints: %s", error)
    return found


def _of_run(run: Run) -> list[Milestone]:
    config, found = run.config, []
    for path in run.checkpoints():
        step = step_of(path.name)
        assert step is not None, path
        found.append(
            Milestone(
                series=run.name,
                step=step,
                tokens=config.tokens_at(step),
                path=path,
                stage=config.stages[config.stage_index(min(max(step, 1), config.steps))].name,
                has_optimizer=(path / "trainer").is_dir(),
            )
        )
    return found


def find(ref: str) -> Milestone | None:
    """The published milestone that `ref` names, or None when its part before `@` is no registry name or repository.

    After `@`: a step (plain integer), what its authors print, a stage, `last`, or tokens (nearest, with a note);
    nothing is the last one. Raises NothingFoundError for a step or word that the series lacks, naming those it has.
    """
    name, _, place = ref.strip().partition("@")
    for milestone in PUBLISHED:
        if milestone.repository == name and milestone.revision == (place or "main"):
            return milestone
    name = _ALIASES.get(name.lower(), name.lower())
    series = [m for m in PUBLISHED if m.series == name]
    return _choose(series, name, place.strip()) if series else None


def _choose(series: list[Milestone], name: str, place: str) -> Milestone:
    if place.lower() in ("", "last"):
        return series[-1]
    for milestone in series:
        if place.lower() in (spelling.lower() for spelling in milestone.printed):
            return milestone
    if place.isdecimal():
        for milestone in series:
            if milestone.step == int(place):
                return milestone
        raise NothingFoundError(f"{name} has no checkpoint at step {place}; it has {_steps(series)}")
    in_stage = [m for m in series if m.stage == place.lower()]
    if in_stage:
        return in_stage[-1]
    try:
        wanted = parse_count(place)
    except ConfigError:
        stages = ", ".join(dict.fromkeys(m.stage for m in series if m.stage))
        raise NothingFoundError(
            f"{name}@{place} must name a step, tokens such as 1.5T, or a stage ({stages}); it has {_steps(series)}"
        ) from None
    nearest = min(series, key=lambda m: abs(m.tokens - wanted))
    if nearest.tokens == wanted:
        return nearest
    note = f"{name}@{place}: the nearest checkpoint is {nearest.name}, after {nearest.tokens:,} tokens"
    return replace(nearest, note=note)


def _steps(series: list[Milestone]) -> str:
    """The steps of a series in words; long ones are shortened in the middle."""
    names = [str(m.step) if m.step is not None else m.printed[0] for m in series]
    if len(names) > 20:
        names = [*names[:13], "…", *names[-2:]]
    return ", ".join(names)
