"""Loss by token as coloured text: static, escaped, with its numbers in tooltips and tables."""

from typing import Any

from tinylab.html.escape import escape
from tinylab.html.tables import table_html

BETTER, WORSE = (0, 114, 178), (213, 94, 0)
"""Blue and vermillion of Okabe-Ito, as in the figures."""
TOP = 8
"""Tokens in each table."""


def token_loss_html(table: Any, a: str = "A", b: str = "B") -> str:
    """The text, each token shaded by loss B − loss A: blue where B is better, vermillion where worse, white at 0.

    `table` is a DataFrame with one row per predicted token: `position`, `text`, `loss_a`, `loss_b`, `delta` (nats).
    The colour is full at the 95th percentile of the differences. Two tables name the most gained and lost tokens, and
    every token has its numbers in its tooltip, so that colour alone says nothing.
    """
    if not len(table):
        return "<p>The text has no tokens to predict.</p>"
    scale = max(float(table["delta"].abs().quantile(0.95)), 1e-6)
    spans = [
        _span(text, la, lb, delta, scale)
        for text, la, lb, delta in table[["text", "loss_a", "loss_b", "delta"]].itertuples(index=False, name=None)
    ]
    mean = float(table["delta"].mean())
    verdict = "better" if mean < 0 else "worse" if mean > 0 else "the same"
    ordered = table.sort_values("delta")
    gained, lost = ordered[ordered["delta"] < 0].head(TOP), ordered[ordered["delta"] > 0].tail(TOP)[::-1]
    legend = (
        f"{_swatch(-1)} {escape(b)} better by {scale:.2f} nats or more &nbsp; {_swatch(0)} equal &nbsp; "
        f"{_swatch(1)} {escape(b)} worse by {scale:.2f} nats or more"
    )
    return (
        f'<div class="tinylab-tokens"><p>{escape(b)} is {verdict} on average: {mean:+.3f} nats per token over '
        f"{len(table)} tokens "
        f"({escape(a)} {table['loss_a'].mean():.3f}, {escape(b)} {table['loss_b'].mean():.3f}).</p>"
        f'<p style="font-size:85%">{legend}</p>'
        f'<div style="font-family:monospace;white-space:pre-wrap;line-height:1.7;border:1px solid #ddd;padding:8px;'
        f'color:#222;background:#fff;max-height:24em;overflow:auto">{"".join(spans)}</div>'
        f'<div style="display:flex;gap:2em;flex-wrap:wrap">{_top(gained, f"Tokens that {b} predicts better")}'
        f"{_top(lost, f'Tokens that {b} predicts worse')}</div></div>"
    )


def _span(text: str, loss_a: float, loss_b: float, delta: float, scale: float) -> str:
    title = f"A {loss_a:.2f}, B {loss_b:.2f}, B - A {delta:+.2f} nats"
    newline = "\n" if text.endswith("\n") else ""
    shown = escape(text.replace("\n", "⏎")) + newline
    return f'<span style="background:{_color(delta / scale)}" title="{title}">{shown}</span>'


def _color(share: float) -> str:
    """White at 0, the full colour (paled, so that black text stays readable) at -1 and 1."""
    strength = 0.62 * min(abs(share), 1.0)
    red, green, blue = (round(255 + (c - 255) * strength) for c in (BETTER if share < 0 else WORSE))
    return f"rgb({red},{green},{blue})"


def _swatch(share: float) -> str:
    return f'<span style="background:{_color(share)};border:1px solid #999;padding:0 0.7em"></span>'


def _top(rows: Any, caption: str) -> str:
    shown = rows[["position", "text", "loss_a", "loss_b", "delta"]].assign(text=[repr(t) for t in rows["text"]])
    shown.columns = ["position", "token", "A (nats)", "B (nats)", "B - A (nats)"]
    return table_html(shown, caption, digits=3) if len(rows) else ""
