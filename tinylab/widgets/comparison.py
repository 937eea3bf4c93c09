"""The analysis of a pair of checkpoints with its figures and its HTML, for the form and for a notebook cell."""

from functools import cached_property
from typing import Any

from tinylab.analysis.pair import LoadedModel, PairAnalysis, analyze_pair
from tinylab.html import parts
from tinylab.html.tables import table_html
from tinylab.html.token_losses import token_loss_html
from tinylab.plots.comparison import flips, position_loss, score_differences, token_delta
from tinylab.plots.style import LabFigure
from tinylab.widgets.show import Html


class ComparisonView(PairAnalysis):
    """A PairAnalysis that shows itself in a notebook: its tables, its figures, and all of it as one static twin."""

    @cached_property
    def figures(self) -> dict[str, LabFigure]:
        """`tokens`, `position`, `differences`, `flips`."""
        return {
            "tokens": token_delta(self.tokens, self.a, self.b),
            "position": position_loss(self.tokens, self.a, self.b),
            "differences": score_differences(self.scores, self.a, self.b),
            "flips": flips(self.scores, self.a, self.b),
        }

    @property
    def tokens_html(self) -> Html:
        """The text with each token shaded by loss B − loss A."""
        return Html(token_loss_html(self.tokens, self.a, self.b), f"{len(self.tokens)} tokens")

    @cached_property
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


def compare_view(a: str | LoadedModel, b: str | LoadedModel, **settings: Any) -> ComparisonView:
    """Compare two models, and show it: loss by token of `text`, continuations of `prompts`, scores and flips.

    a, b: REFs, or models already in memory. settings: those of tinylab.analysis.pair.analyze_pair, which are `text`,
    `prompts`, `max_new_tokens`, `temperature`, `seed`, `store` and `device`; it also says what is raised.
    """
    return ComparisonView(**vars(analyze_pair(a, b, **settings)))
