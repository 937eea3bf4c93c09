"""Figures from records: every function takes runs or tables and returns a matplotlib Figure that shows itself.

No pyplot and no global state. x is tokens, both axes have units, uncertainty is drawn; colours are Okabe-Ito in a
fixed order.
"""

from tinylab.plots.comparison import flips, position_loss, score_differences, token_delta
from tinylab.plots.corpus import document_lengths, mixture_of, token_frequencies
from tinylab.plots.model import series_audit, shares
from tinylab.plots.scaling import scaling
from tinylab.plots.scores import score_trajectories
from tinylab.plots.style import LabFigure
from tinylab.plots.training import gradient_norm, learning_rate, loss_curves, throughput, validation_bits

__all__ = [
    "LabFigure",
    "document_lengths",
    "flips",
    "gradient_norm",
    "learning_rate",
    "loss_curves",
    "mixture_of",
    "position_loss",
    "scaling",
    "score_differences",
    "score_trajectories",
    "series_audit",
    "shares",
    "throughput",
    "token_delta",
    "token_frequencies",
    "validation_bits",
]
