"""Two models side by side, as tables: identity, loss by token, continuations, scores and flips on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas

from tinylab.catalog.reference import Reference, load_model, load_tokenizer, resolve_reference
from tinylab.config.counts import format_count
from tinylab.errors import TinylabError
from tinylab.evaluation.compare import compare
from tinylab.evaluation.paired import Comparison
from tinylab.evaluation.records import ResultStore
from tinylab.runs.folder import Run, step_of
from tinylab.runs.plain import to_plain

if TYPE_CHECKING:
    from tinylab.data.tokenizer.encode import Tokenizer
    from tinylab.model.transformer import Llama

FLIP_COLUMNS = ("task", "direction", "margin_a", "margin_b", "prompt", "right answer", "chosen instead", "origin")
SHOWN_CHARACTERS = 160
"""Of a prompt's end and of an answer's beginning, in the table of flips."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with its tokenizer and what its REF resolved to."""

    reference: Reference
    model: Llama
    tokenizer: Tokenizer


@dataclass(frozen=True)
class PairAnalysis:
    """Everything that is known about B against A; what could not be compared is an empty table with a note."""

    a: str
    """Label of A, as in tables and figures."""
    b: str
    identity: pandas.DataFrame
    """One row per property, columns A and B."""
    tokens: pandas.DataFrame
    """Loss by token (analysis/token_losses.py); empty when the tokenizers differ."""
    generations: pandas.DataFrame
    """`prompt`, and the continuation by each model."""
    scores: pandas.DataFrame
    """The paired table (evaluation/paired.py); empty without scores on the same items."""
    flips: pandas.DataFrame
    """Items that one model has right and the other wrong, largest change of margin first: FLIP_COLUMNS."""
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The findings as plain values, for JSON."""
        means = {f"loss_{side}": self.tokens[f"loss_{side}"].mean() if len(self.tokens) else None for side in "ab"}
        tables = {"generations": self.generations, "scores": self.scores}
        counts = {"tokens": len(self.tokens), "flips": len(self.flips)}
        return to_plain({"a": self.a, "b": self.b, **means, **tables, **counts, "notes": self.notes})


def load(ref: str, device: str = "cpu") -> LoadedModel:
    """The model that REF names, in memory, in fp32. Raises what `resolve_reference` and `load_model` raise."""
    import torch

    reference = resolve_reference(ref)
    return LoadedModel(reference, load_model(reference, device, torch.float32), load_tokenizer(reference))


def analyze_pair(
    a: str | LoadedModel,
    b: str | LoadedModel,
    *,
    text: str,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    store: str | None = None,
    device: str = "cpu",
) -> PairAnalysis:
    """Compare two models: loss by token of `text`, continuations of `prompts` (same seed), scores and flips.

    a, b: REFs, or models already in memory (`load`). Scores come from what the stores hold; nothing is evaluated here.
    Raises NothingFoundError or CheckpointError for a REF that cannot be used.
    """
    first = load(a, device) if isinstance(a, str) else a
    second = load(b, device) if isinstance(b, str) else b
    notes = [*first.reference.notes, *second.reference.notes]
    tokens = _tokens(first, second, text, notes)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    generations = _generations(first, second, prompts, settings)
    comparison = _scores(first.reference, second.reference, store, notes)
    identity = _identity(first, second, comparison)
    columns: Any = list(FLIP_COLUMNS)
    scores = comparison.table() if comparison else pandas.DataFrame()
    flips = pandas.DataFrame([_flip_row(f) for f in comparison.flips()] if comparison else [], columns=columns)
    labels = first.reference.label, second.reference.label
    return PairAnalysis(*labels, identity, tokens, generations, scores, flips, tuple(notes))


def scored_pair(run: Run) -> tuple[str, str] | None:
    """REFs of the middle and the last checkpoint of a run that have scores; None when fewer than two have."""
    scored = {record.header.get("step") for record in ResultStore(run.evaluations_path).records()}
    paths = [path for path in run.checkpoints() if step_of(path.name) in scored]
    return (str(paths[(len(paths) - 1) // 2]), str(paths[-1])) if len(paths) > 1 else None


def compare_scores(a: str | Reference, b: str | Reference, store: str | None = None) -> Comparison:
    """The paired comparison of what the stores hold. Raises EvaluationError or NothingFoundError when there is none."""
    return compare(a, b, store, evaluate_missing=False, progress=False)


def _tokens(first: LoadedModel, second: LoadedModel, text: str, notes: list[str]) -> pandas.DataFrame:
    from tinylab.analysis.token_losses import compare_tokens

    try:
        if first.tokenizer.hash == second.tokenizer.hash:
            return compare_tokens(first.model, second.model, first.tokenizer, text)
        notes.append("loss by token: the two models have different tokenizers, so their tokens do not pair")
    except TinylabError as error:
        notes.append(f"loss by token: {error}")
    columns: Any = ["position", "id", "text", "loss_a", "loss_b", "delta"]
    return pandas.DataFrame(columns=columns)


def _generations(
    first: LoadedModel, second: LoadedModel, prompts: Sequence[str], settings: dict[str, Any]
) -> pandas.DataFrame:
    """`prompt`, then one column per model, marked A and B so that equal labels stay apart."""
    from tinylab.model.generate import generate

    sides = {f"A: {first.reference.label}": first, f"B: {second.reference.label}": second}
    empty = "(nothing: the document ends here)"
    rows = [
        {"prompt": prompt} | {n: generate(s.model, s.tokenizer, prompt, **settings) or empty for n, s in sides.items()}
        for prompt in prompts
    ]
    columns: Any = ["prompt", *(sides if rows else "AB")]
    return pandas.DataFrame(rows, columns=columns)


def _scores(a: Reference, b: Reference, store: str | None, notes: list[str]) -> Comparison | None:
    try:
        comparison = compare_scores(a, b, store)
    except TinylabError as error:
        notes.append(f"scores: {error}")
        return None
    notes += [note for note in comparison.notes if note not in notes]
    if comparison.same_weights:
        notes.insert(0, "A and B are the same weights: every difference is 0 by identity")
    return comparison


def _flip_row(flip: dict[str, Any]) -> dict[str, Any]:
    """A flip with its texts; an answer whose text is no longer in the store is its number."""
    gold, wrong = flip["gold"], next(c for c in (flip["chosen_a"], flip["chosen_b"]) if c != flip["gold"])
    choices = flip.get("choices")
    right, chosen = (str(choices[i] if choices else i)[:SHOWN_CHARACTERS] for i in (gold, wrong))
    prompt = str(flip.get("prompt") or "")[-SHOWN_CHARACTERS:]
    return flip | {"prompt": prompt, "right answer": right, "chosen instead": chosen}


def _identity(first: LoadedModel, second: LoadedModel, comparison: Comparison | None) -> pandas.DataFrame:
    def column(side: LoadedModel, scored: dict[str, Any] | None) -> dict[str, Any]:
        reference = side.reference
        return {
            "model": reference.label,
            "step": reference.step,
            "tokens": None if reference.tokens is None else format_count(reference.tokens),
            "stage": reference.stage,
            "parameters": f"{sum(p.numel() for p in side.model.parameters()):,}",
            "context (tokens)": side.model.config.seq_len,
            "tokenizer": side.tokenizer.hash[:16],
            "weights (SHA-256)": scored["weights"][:16] if scored else "not scored",
        }

    a = column(first, comparison.a if comparison else None)
    b = column(second, comparison.b if comparison else None)
    shown = {"": list(a)} | {n: ["n/a" if v is None else str(v) for v in c.values()] for n, c in (("A", a), ("B", b))}
    return pandas.DataFrame(shown, dtype=object)
