"""Draw the README's pictures from a finished demo: `.venv/bin/python docs/pictures.py runs/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

from tinylab import Run, Scores, plots, published
from tinylab.widgets import compare_view

TEXT = (
    "Return a new list containing all items from the iterable in ascending order. A custom key function can be "
    "supplied to customize the sort order, and the reverse flag can be set to request the result in descending order."
)


def main(run_path: str) -> None:
    """Write docs/images/{loss,scores,tokens}.png."""
    run, folder = Run(run_path).require(), Path(__file__).parent / "images"
    early = next(p for p in run.checkpoints() if p.name == "step-00000064")
    view = compare_view(str(early), str(run.checkpoints()[-1]), text=TEXT, prompts=[])
    pictures = {
        "loss": plots.loss_curves([run]),
        "scores": plots.score_trajectories(Scores(run.evaluations_path).table(), published()),
        "tokens": view.figures["tokens"],
    }
    for name, figure in pictures.items():
        (folder / f"{name}.png").write_bytes(figure.png(dpi=100))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["demo"])
