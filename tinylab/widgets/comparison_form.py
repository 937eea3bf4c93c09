"""A form over `compare_view`: choose two checkpoints, a text and prompts; results and errors appear below."""

import os
import re
import threading
from collections.abc import Sequence
from typing import Any

import ipywidgets

from tinylab.analysis.pair import LoadedModel, load
from tinylab.catalog.reference import Reference, resolve_reference, run_references
from tinylab.config.counts import format_count
from tinylab.html import parts
from tinylab.runs.folder import Run
from tinylab.widgets.comparison import ComparisonView, compare_view
from tinylab.widgets.show import Html, bundle

_WIDE = {"description_width": "13em"}
_LINE = {"width": "34em"}
_AREA = {"width": "50em", "height": "5em"}
_LATE: dict[str, Any] = {"continuous_update": False}
_ONE_LINE = {ord("\n"): r"\n", ord("\\"): r"\\"}
"""How a prompt is written in one line of the form."""


class CompareCheckpoints:
    """Two checkpoints compared on demand, with a browser or without one.

    a, b: REFs; when one is a checkpoint of a run, all checkpoints of that run can be chosen. `view` is a finished
    result to show at first; without it, `static()` or the button makes the first one. The form works by keyboard,
    states in words what it is doing, and keeps its models loaded between comparisons.
    """

    def __init__(
        self,
        a: str,
        b: str,
        *,
        text: str = "The quick brown fox jumps over the lazy dog.",
        prompts: Sequence[str] = (),
        view: ComparisonView | None = None,
        device: str = "cpu",
    ) -> None:
        self.device = device
        self.view = view
        self._models: dict[str, LoadedModel] = {}
        self._thread: threading.Thread | None = None
        choices = _choices(a, b)
        self.a = _control(ipywidgets.Dropdown, "A (earlier)", a, options=choices)
        self.b = _control(ipywidgets.Dropdown, "B (later)", b, options=choices)
        self.text = _control(ipywidgets.Textarea, "Text to score", text, layout=_AREA, **_LATE)
        lines = "\n".join(prompt.translate(_ONE_LINE) for prompt in prompts)
        self.prompts = _control(ipywidgets.Textarea, "Prompts, one per line", lines, layout=_AREA, **_LATE)
        self.length = _control(ipywidgets.IntSlider, "Continue (tokens)", 40, min=1, max=200, **_LATE)
        heat: dict[str, Any] = {"min": 0, "max": 2, "step": 0.1, **_LATE}
        self.temperature = _control(ipywidgets.FloatSlider, "Temperature (0: greedy)", 0, **heat)
        self.seed = _control(ipywidgets.BoundedIntText, "Seed", 0, min=0, max=2**31 - 1)
        self.button = ipywidgets.Button(description="Compare", button_style="primary", tooltip="Compare A and B")
        self.state = ipywidgets.Label(value="ready: press Compare")
        self.result = ipywidgets.HTML(value=view.html if view else "")
        controls = [self.a, self.b, self.text, self.prompts, self.length, self.temperature, self.seed]
        self.form = ipywidgets.VBox([*controls, ipywidgets.HBox([self.button, self.state]), self.result])
        self.button.on_click(self._start)

    def static(self) -> Html:
        """The comparison as HTML that needs no frontend: the same tables, figures and text as the form shows."""
        if self.view is None:
            self._compare(*self._question())
        return Html(self.result.value, repr(self.view) if self.view else "the comparison failed")

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the comparison that the button started has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return bundle(None if os.environ.get("TINYLAB_EXECUTOR") else self.form, self.static())

    def _start(self, _: Any = None) -> None:
        """Answer the button at once; a thread does the work, because models load slowly."""
        if self._thread is not None and self._thread.is_alive():
            self.state.value = "still working: one comparison at a time"
            return
        self.button.disabled = True
        self.state.value = f"loading {self.a.label} and {self.b.label} …"
        self._thread = threading.Thread(target=self._compare, args=self._question(), daemon=True)
        self._thread.start()

    def _question(self) -> tuple[str, str, dict[str, Any]]:
        lines = filter(None, self.prompts.value.split("\n"))
        prompts = [re.sub(r"\\([\\n])", lambda found: "\n" if found[1] == "n" else "\\", line) for line in lines]
        settings = {"text": self.text.value, "prompts": prompts, "max_new_tokens": self.length.value}
        settings |= {"temperature": self.temperature.value, "seed": self.seed.value}
        return str(self.a.value), str(self.b.value), settings

    def _compare(self, a: str, b: str, settings: dict[str, Any]) -> None:
        """Compare and show; whatever goes wrong is shown in the view, not lost in a log."""
        try:
            first, second = self._load(a), self._load(b)
            self.state.value = f"comparing {first.reference.label} and {second.reference.label} …"
            self.view = compare_view(first, second, device=self.device, **settings)
            self.result.value = self.view.html
            self.state.value = f"done: {self.view.b} against {self.view.a}"
        except Exception as error:
            self.view = None
            self.result.value = parts.error(error, "The comparison")
            self.state.value = "failed: see below"
        finally:
            self.button.disabled = False

    def _load(self, ref: str) -> LoadedModel:
        """The model of REF, loaded once; the two newest stay in memory."""
        if ref not in self._models:
            self._models = dict(list(self._models.items())[-1:]) | {ref: load(ref, self.device)}
        return self._models[ref]


def _control(kind: Any, description: str, value: Any, *, layout: dict[str, str] = _LINE, **settings: Any) -> Any:
    return kind(description=description, value=value, style=_WIDE, layout=layout, **settings)


def _choices(a: str, b: str) -> list[tuple[str, str]]:
    """(label, REF) for A, B and every checkpoint of their runs, each REF once."""
    given = {ref: resolve_reference(ref) for ref in (a, b)}
    found = {str(r.path): ref for ref, r in given.items()}
    choices = []
    for run in dict.fromkeys(r.run for r in given.values() if r.run is not None):
        for reference in run_references(Run(run)):
            choices.append((_label(reference), found.pop(str(reference.path), str(reference.path))))
    others = [(_label(given[ref]), ref) for ref in found.values()]
    known = {ref for _, ref in choices + others}
    return choices + others + [(f"{_label(given[ref])} ", ref) for ref in (a, b) if ref not in known]


def _label(reference: Reference) -> str:
    return reference.label + (f", {format_count(reference.tokens)} tokens" if reference.tokens is not None else "")
