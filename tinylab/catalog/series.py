"""What a REF names after its `@`: one grammar for the checkpoints of a run and for published series."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tinylab.config.counts import parse_count
from tinylab.errors import ConfigError, NothingFoundError

_SHOWN = 20
_BEYOND = 1.1
"""How far outside a series, as a ratio, a number of tokens may be and still mean its first or last checkpoint: people
round what they write."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint of a series."""

    label: str
    """Short name in tables, e.g. `demo@500`."""
    step: int | None = None
    """Optimizer steps before it; None where it was never published."""
    tokens: int | None = None
    """Tokens before it, over all ranks."""
    stage: str | None = None
    """Stage of the run that made it."""
    printed: tuple[str, ...] = ()
    """What its authors call it: `1T`, `1007B`, `480k`."""
    notes: tuple[str, ...] = ()
    """What the user should know: a nearest match, a damaged newer checkpoint, an assumption."""


C = TypeVar("C", bound=Checkpoint)


def choose(known: Sequence[C], name: str, place: str) -> C:
    """The checkpoint of the series `name`, `known` in the order of its steps, that `name`@`place` means.

    place: a step (plain integer), what its authors print, a stage (its last checkpoint), `last`, or tokens such as
    1.5B (nearest, with a note). Raises NothingFoundError, naming what there is, for a step or word that the
    series lacks and for tokens far outside it.
    """
    word = place.strip().lower()
    for checkpoint in known:
        if word in (spelling.lower() for spelling in checkpoint.printed):
            return checkpoint
    if word.replace("_", "").isdecimal():
        step = int(word.replace("_", ""))
        found = [c for c in known if c.step == step]
        if not found:
            raise NothingFoundError(f"{name} has no checkpoint at step {step}; it has {_steps(known, step)}")
        return found[0]
    in_stage = [c for c in known if c.stage is not None and c.stage.lower() == word]
    if in_stage or word == "last":
        return (in_stage or known)[-1]
    try:
        wanted = parse_count(word)
    except ConfigError:
        stages = ", ".join(dict.fromkeys(c.stage for c in known if c.stage))
        raise NothingFoundError(
            f"{name}@{place} must name a step, tokens such as 1.5T, or a stage ({stages}); it has {_steps(known)}"
        ) from None
    nearest = min(known, key=lambda c: abs((c.tokens or 0) - wanted))
    first, last, tokens = known[0].tokens or 0, known[-1].tokens or 0, nearest.tokens or 0
    if not first / _BEYOND <= wanted <= last * _BEYOND:
        raise NothingFoundError(
            f"{name} has no checkpoint near {place} tokens; the nearest is {nearest.label}, after {tokens:,} tokens"
        )
    if tokens == wanted:
        return nearest
    note = f"{name}@{place}: the nearest checkpoint is {nearest.label}, after {tokens:,} tokens"
    return replace(nearest, notes=(note,))


def _steps(known: Sequence[Checkpoint], near: int = 0) -> str:
    """The steps of a series in words; of a long one its ends and the two nearest to `near`."""
    shown = list(known)
    if len(known) > _SHOWN:
        nearest = sorted(known, key=lambda c: abs((c.step or 0) - near))[:2]
        shown = [c for c in known if c in (known[0], *nearest, known[-1])]
    names = ", ".join(str(c.step) if c.step is not None else c.printed[0] for c in shown)
    more = f" and {len(known) - len(shown)} more" if len(shown) < len(known) else ""
    return f"{'steps ' if known[0].step is not None else ''}{names}{more}"
