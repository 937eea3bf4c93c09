"""Published checkpoints, by name, step, tokens or stage. Standard library only.

`tinyllama-1.1b@1T`, `@480000` (a step), `@480k`, `@1007B` (as printed), `@1.4T` (nearest, with a note), `@pretrain`
(stage). Tokens follow from the step; what was printed is kept as a spelling that finds it.
Sources: jzhang38/TinyLlama:README.md, EVAL.md and pretrain/tinyllama.py; the model cards of TinyLlama/TinyLlama_v1.1
and its variants; EleutherAI/pythia:README.md.
"""

from dataclasses import dataclass

from tinylab.catalog.series import Checkpoint, choose
from tinylab.config.stages import STEP_TOKENS
from tinylab.errors import NothingFoundError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Milestone(Checkpoint):
    """One published checkpoint. `tokens`: step times tokens per step, or as printed where no step is known."""

    series: str
    """`tinyllama-1.1b`, `tinyllama-1.1b-v1.1`, `pythia-1b`."""
    title: str
    """Its name in its authors' tables of scores: `480k`, `v1.1 math_code`, `Pythia-1.0B`."""
    printed_tokens: str | None = None
    """Tokens in the same tables: `1007B`."""
    repository: str
    """Hugging Face Hub id."""
    revision: str = "main"
    """Branch or tag of the repository."""
    architecture: str = "llama"
    """`llama` opens here; any other is listed for comparison and cannot be loaded."""


_TINYLLAMA = (
    (50_000, "PY007/TinyLlama-1.1B-step-50K-105b", "103B", ("105B", "104B", "103B", "50k")),
    (240_000, "PY007/TinyLlama-1.1B-intermediate-step-240k-503b", "503B", ("503B", "240k")),
    (480_000, "PY007/TinyLlama-1.1B-intermediate-step-480k-1T", "1007B", ("1T", "1007B", "480k")),
    (715_000, "PY007/TinyLlama-1.1B-intermediate-step-715k-1.5T", "1.5T", ("1.5T", "715k")),
    (955_000, "TinyLlama/TinyLlama-1.1B-intermediate-step-955k-token-2T", "2T", ("2T", "955k")),
    (1_195_000, "TinyLlama/TinyLlama-1.1B-intermediate-step-1195k-token-2.5T", "2.5T", ("2.5T", "1195k")),
    (1_430_512, "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "3T", ("3T", "1431k")),
)
"""Step, Hub id, tokens in EVAL.md, and every spelling; the last one is EVAL.md's name of the checkpoint."""
_PYTHIA_STEPS = (0, *(2**i for i in range(10)), *range(1000, 143_001, 1000))

PUBLISHED: tuple[Milestone, ...] = (
    *(
        Milestone(
            label=f"tinyllama-1.1b@{step}",
            series="tinyllama-1.1b",
            title=printed[-1],
            step=step,
            tokens=step * STEP_TOKENS,
            printed_tokens=printed_tokens,
            repository=repository,
            printed=printed,
            stage="pretrain",
        )
        for step, repository, printed_tokens, printed in _TINYLLAMA
    ),
    *(
        Milestone(
            label=f"tinyllama-1.1b-v1.1{variant}@2T",
            series=f"tinyllama-1.1b-v1.1{variant}",
            title=f"v1.1{variant.replace('-', ' ')}",
            tokens=2_000_000_000_000,
            printed_tokens="2T",
            repository=f"TinyLlama/TinyLlama_v1.1{variant.replace('-', '_')}",
            printed=("2T",),
            stage="cooldown",
            notes=("tokens as printed: the step and the exact batch were not published",),
        )
        for variant in ("", "-math_code", "-chinese")
    ),
    *(
        Milestone(
            label=f"pythia-1b@{step}",
            series="pythia-1b",
            title="Pythia-1.0B",
            step=step,
            tokens=step * STEP_TOKENS,
            repository="EleutherAI/pythia-1b",
            revision=f"step{step}",
            printed_tokens="300B" if step == _PYTHIA_STEPS[-1] else None,
            printed=(f"step{step}", *(("300B",) if step == _PYTHIA_STEPS[-1] else ())),
            stage="pretrain",
            architecture="gpt_neox",
        )
        for step in _PYTHIA_STEPS
    ),
)
"""Every published checkpoint known here, by series and tokens. More steps of TinyLlama are branches of
`TinyLlama/tinyLlama-intermediate-checkpoints`: name them by Hub id and revision."""
_ALIASES = {
    "tinyllama": "tinyllama-1.1b",
    "tinyllama-1.1b-v1.0": "tinyllama-1.1b",
    "tinyllama-v1.1": "tinyllama-1.1b-v1.1",
    "pythia-1.0b": "pythia-1b",
}


def list_milestones(series: str) -> list[Milestone]:
    """The published checkpoints of a series. Raises NothingFoundError for an unknown one, naming the nearest."""
    name = _ALIASES.get(series.lower(), series.lower())
    found = [m for m in PUBLISHED if m.series == name]
    if not found:
        names = list(dict.fromkeys(m.series for m in PUBLISHED))
        hint = did_you_mean(name, names, f"known: {', '.join(names)}")
        raise NothingFoundError(f"no series of published checkpoints is called {series}; {hint}")
    return found


def find(ref: str) -> Milestone | None:
    """The published milestone that `ref` names, or None when its part before `@` is no series or repository.

    Raises NothingFoundError for a place after the `@` that the series lacks (catalog/series.py).
    """
    name, _, place = ref.strip().partition("@")
    for milestone in PUBLISHED:
        if milestone.repository == name and milestone.revision == (place or "main"):
            return milestone
    name = _ALIASES.get(name.lower(), name.lower())
    series = [m for m in PUBLISHED if m.series == name]
    return choose(series, name, place or "last") if series else None
