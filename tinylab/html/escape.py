"""The one way from a model's or a file's text into HTML: JupyterLab runs scripts in the output of its own kernel."""

import re
from typing import Any

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_MARKUP = {c: f"&#{ord(c)};" for c in "&<>\"'`$%\\*_~[]{}|"}
"""HTML's own characters, and those that Markdown and MathJax act on ($, %, backslash, brackets …)."""


def escape(text: Any) -> str:
    """`text` made safe inside HTML text and quoted attributes, with its invisible characters shown.

    Terminal colours vanish; NUL, other controls, bidirectional and zero-width characters become `[U+202E]`; markup,
    `$` and backslashes become numeric entities, so that neither HTML, Markdown nor MathJax acts on them.
    """
    plain = _INVISIBLE.sub(lambda m: f"[U+{ord(m[0]):04X}]", _ANSI.sub("", str(text)))
    return "".join(_MARKUP.get(c, c) for c in plain)
