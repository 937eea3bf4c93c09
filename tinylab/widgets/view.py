"""Two checkpoints side by side: identity, loss by token, continuations, scores and flips. No widget here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinylab.catalog.reference import Reference, load_model, load_tokenizer, resolve_reference
from tinylab.config.counts import format_count
from tinylab.errors import TinylabError
from tinylab.evaluation.paired import Comparison
from tinylab.html import parts
from tinylab.html.tables import table_html
from tinylab.html.token_losses import token_loss_html
from tinylab.plots.comparison import flips as draw_flips
from tinylab.plots.comparison import position_loss, score_differences, token_delta
from tinylab.plots.style import LabFigure
from tinylab.runs.folder import Run
from tinylab.widgets.show import Html

if TYPE_CHECKING:
    import pandas

    from tinylab.data.tokenizer.encode import Tokenizer
    from tinylab.model.transformer import Llama

FLIP_COLUMNS = ("task", "direction", "margin_a", "margin_b", "prompt", "right answer", "chosen instead", "origin")
_CHARACTERS = 160
"""Of a prompt's end and of an answer's beginning, in the table of flips."""


@dataclass(frozen=True)
class Loaded:
    """A model that is in memory, with its tokenizer and what REF resolved to."""

    reference: Reference
    model: Llama
    tokenizer: Tokenizer


@dataclass(frozen=True)
class ComparisonView:
    """Everything a comparison shows, as tables, figures and HTML; it shows itself whole as its static twin."""

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
    """The paired table (evaluation/paired.py); empty when nothing can be compared."""
    flips: pandas.DataFrame
    """Items that changed side, largest change of margin first."""
    notes: tuple[str, ...] = ()
    figures: dict[str, LabFigure] = field(default_factory=dict)
    """`tokens`, `position`, `differences`, `flips`."""

    @property
    def tokens_html(self) -> Html:
        """The text with each token shaded by B − A."""
        return Html(token_loss_html(self.tokens, self.a, self.b), f"{len(self.tokens)} tokens")

    @property
    def html(self) -> str:
        """All of it in one piece, readable offline."""
        return parts.framed(
            [
                table_html(self.identity, "A and B"),
                parts.bullets(self.notes),
                parts.heading("Loss by token", 4),
                self.tokens_html.html,
                parts.picture(self.figures["tokens"], "Loss of B minus loss of A at every token of the text"),
                parts.picture(self.figures["position"], "Mean loss of A and B by position in the text"),
                parts.heading("Continuations", 4),
                table_html(self.generations),
                parts.heading("Scores on the same items", 4),
                parts.picture(self.figures["differences"], "Score of B minus score of A per task, with 95% intervals"),
                parts.picture(self.figures["flips"], "Items that changed side from A to B per task"),
                table_html(self.flips.head(12), "Items that flipped, largest change of margin first", digits=3),
            ]
        )

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"{self.b} against {self.a}: {self.summary()}"

    def summary(self) -> dict[str, Any]:
        """The findings as plain values, for JSON."""
        tokens: Any = self.tokens
        return {
            "a": self.a,
            "b": self.b,
            "tokens": len(self.tokens),
            "loss_a": float(tokens["loss_a"].mean()) if len(tokens) else None,
            "loss_b": float(tokens["loss_b"].mean()) if len(tokens) else None,
            "generations": self.generations.to_dict("records"),
            "scores": self.scores.to_dict("records"),
            "flips": len(self.flips),
            "notes": list(self.notes),
        }


def load(ref: str, device: str = "cpu") -> Loaded:
    """The model that REF names, in memory, in fp32. Raises what `resolve_reference` and `load_model` raise."""
    import torch

    reference = resolve_reference(ref)
    return Loaded(reference, load_model(reference, device, torch.float32), load_tokenizer(reference))


def compare_view(
    a: str | Loaded,
    b: str | Loaded,
    *,
    text: str,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    store: str | None = None,
    device: str = "cpu",
) -> ComparisonView:
    """Compare two models: loss by token of `text`, continuations of `prompts` (same seed), scores and flips.

    a, b: REFs, or models already in memory (`load`). Scores come from what the stores hold; nothing is evaluated here.
    What cannot be compared (two tokenizers, no scores) stands in `notes`, and its table is empty.
    Raises NothingFoundError or CheckpointError for a REF that cannot be used.
    """
    first = load(a, device) if isinstance(a, str) else a
    second = load(b, device) if isinstance(b, str) else b
    notes = [*first.reference.notes, *second.reference.notes]
    tokens = _tokens(first, second, text, notes)
    generations = _generations(first, second, prompts, max_new_tokens, temperature, seed)
    comparison = _scores(first.reference, second.reference, store, notes)
    labels = first.reference.label, second.reference.label
    scores, flips = _score_tables(comparison)
    figures = {
        "tokens": token_delta(tokens, *labels),
        "position": position_loss(tokens, *labels),
        "differences": score_differences(scores, *labels),
        "flips": draw_flips(scores, *labels),
    }
    return ComparisonView(
        *labels, _identity(first, second, comparison), tokens, generations, scores, flips, tuple(notes), figures
    )


def scored_pair(run: Run) -> tuple[str, str] | None:
    """REFs of the middle and the last checkpoint of a run that have scores; None when fewer than two have."""
    from tinylab.evaluation.records import ResultStore

    scored = {r.header.get("step") for r in ResultStore(run.evaluations_path).records()}
    paths = [path for path in run.checkpoints() if int(path.name.removeprefix("step-")) in scored]
    return (str(paths[(len(paths) - 1) // 2]), str(paths[-1])) if len(paths) > 1 else None


def compare_scores(a: str | Reference, b: str | Reference, store: str | None = None) -> Comparison:
    """The paired comparison of what the stores hold. Raises EvaluationError or NothingFoundError when there is none."""
    from tinylab.evaluation.compare import compare

    return compare(a, b, store, evaluate_missing=False, progress=False)


def _tokens(first: Loaded, second: Loaded, text: str, notes: list[str]) -> Any:
    import pandas

    from tinylab.analysis.token_losses import compare_tokens

    try:
        if first.tokenizer.hash == second.tokenizer.hash:
            return compare_tokens(first.model, second.model, first.tokenizer, text)
        notes.append("loss by token: the two models have different tokenizers, so their tokens do not pair")
    except TinylabError as error:
        notes.append(f"loss by token: {error}")
    return pandas.DataFrame(columns=["position", "id", "text", "loss_a", "loss_b", "delta"])


def _generations(
    first: Loaded, second: Loaded, prompts: Sequence[str], max_new_tokens: int, temperature: float, seed: int
) -> Any:
    """`prompt`, then one column per model; the columns carry A and B so that equal labels stay apart."""
    import pandas

    from tinylab.model.generate import generate

    rows = []
    for prompt in prompts:
        row = {"prompt": prompt}
        for name, loaded in (("A", first), ("B", second)):
            text = generate(
                loaded.model,
                loaded.tokenizer,
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
            )
            row[f"{name}: {loaded.reference.label}"] = text or "(nothing: the document ends here)"
        rows.append(row)
    return pandas.DataFrame(rows, columns=list(rows[0]) if rows else ["prompt", "A", "B"])


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


def _score_tables(comparison: Comparison | None) -> tuple[Any, Any]:
    import pandas

    if comparison is None:
        return pandas.DataFrame(), pandas.DataFrame(columns=list(FLIP_COLUMNS))
    rows = [_flip_row(flip) for flip in comparison.flips()]
    return comparison.table(), pandas.DataFrame(rows, columns=list(FLIP_COLUMNS))


def _flip_row(flip: dict[str, Any]) -> dict[str, Any]:
    """A flip with its texts; where the store has them no more, an answer is its number."""
    gold, chosen = flip["gold"], (flip["chosen_a"], flip["chosen_b"])
    answers = [str(flip["choices"][i] if flip.get("choices") else i) for i in (gold, *(c for c in chosen if c != gold))]
    texts = {"right answer": answers[0][:_CHARACTERS], "chosen instead": answers[1][:_CHARACTERS]}
    return flip | texts | {"prompt": str(flip.get("prompt") or "")[-_CHARACTERS:]}


def _identity(first: Loaded, second: Loaded, comparison: Comparison | None) -> Any:
    import pandas

    sides = (first, second)
    weights = [side["weights"][:16] for side in (comparison.a, comparison.b)] if comparison else ["not scored"] * 2
    rows = {
        "model": [s.reference.label for s in sides],
        "step": [s.reference.step for s in sides],
        "tokens": [format_count(t) if (t := s.reference.tokens) is not None else None for s in sides],
        "stage": [s.reference.stage for s in sides],
        "parameters": [f"{sum(p.numel() for p in s.model.parameters()):,}" for s in sides],
        "context (tokens)": [s.model.config.seq_len for s in sides],
        "tokenizer": [s.tokenizer.hash[:16] for s in sides],
        "weights (SHA-256)": weights,
    }
    columns: dict[str, list[Any]] = {"": list(rows)}
    for i, name in enumerate(("A", "B")):
        columns[name] = ["n/a" if values[i] is None else str(values[i]) for values in rows.values()]
    return pandas.DataFrame(columns, dtype=object)
