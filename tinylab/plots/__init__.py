"""Figures from records: every function takes runs or tables and returns a matplotlib Figure that shows itself.

No pyplot and no global state. x is tokens, both axes have units, uncertainty is drawn; colours are Okabe-Ito in a
fixed order.
"""

from __future__ import annotations

from tinylab.html.escape import escape, table_html
from tinylab.html.spans import token_loss_html
from tinylab.plots.comparison import flips, position_loss, score_differences, token_delta
from tinylab.plots.corpus import document_lengths, mixture_of, token_frequencies
from tinylab.plots.model import series_audit, shares
from tinylab.plots.scores import score_trajectories
from tinylab.plots.style import LabFigure
from tinylab.plots.training import gradient_norm, learning_rate, loss_curves, throughput, validation_bits

__all__ = [
    "LabFigure",
    "document_lengths",
    "escape",
    "flips",
    "gradient_norm",
    "learning_rate",
    "loss_curves",
    "mixture_of",
    "position_loss",
    "score_differences",
    "score_trajectories",
    "series_audit",
    "shares",
    "table_html",
    "throughput",
    "token_delta",
    "token_frequencies",
    "token_loss_html",
    "validation_bits",
]
