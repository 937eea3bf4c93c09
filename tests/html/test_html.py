"""HTML of hostile text: it is shown and never acts; tables and token colours say what their numbers say."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pandas
import pytest

from tinylab.html import parts
from tinylab.html.escape import escape
from tinylab.html.page import page_html
from tinylab.html.tables import table_html
from tinylab.html.token_losses import token_loss_html
from tinylab.plots.style import LabFigure

HOSTILE = "<script>alert(1)</script> $x$ `y` \x1b[31mred\x1b[0m \u202egnp\u202c \x00 </table> \" ' & \\(z\\)"


def losses(texts: list[str]) -> pandas.DataFrame:
    a = np.linspace(1, 5, len(texts))
    b = a + np.where(np.arange(len(texts)) % 2, 0.5, -1.0)
    positions = range(1, len(texts) + 1)
    return pandas.DataFrame({"position": positions, "text": texts, "loss_a": a, "loss_b": b, "delta": b - a})


class Collector(HTMLParser):
    """Tags and text of a piece of HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "html",
    [
        token_loss_html(losses([" the", "\n", "cat", HOSTILE] * 8)),
        token_loss_html(losses(["a", "b"]), HOSTILE, HOSTILE),
        table_html(losses([HOSTILE]), HOSTILE),
        table_html({HOSTILE: 1}, "one mapping"),
        table_html([{"nested": [HOSTILE], HOSTILE: 2}]),
        parts.heading(HOSTILE),
        parts.paragraph(HOSTILE),
        parts.bullets([HOSTILE]),
        parts.code(HOSTILE),
        parts.captioned(LabFigure(figsize=(1, 1)), HOSTILE),
        parts.error(ValueError(HOSTILE), "The comparison"),
        page_html(HOSTILE, HOSTILE, {HOSTILE: ""}),
    ],
)
def test_hostile_text_is_shown_and_never_acts(html: str):
    seen = Collector()
    seen.feed(html)
    assert "script" not in seen.tags and "<script>alert(1)</script>" in seen.text
    assert not re.search("[\x00\x1b\u202e\u202c$`\\\\]", re.sub(r"&#\d+;", "", html))
    assert "[U+202E]" in seen.text and "[U+0000]" in seen.text and "red" in seen.text


def test_escaped_text_reads_back_as_it_was():
    assert escape("a <b> & 'c' \"d\"") == "a &#60;b&#62; &#38; &#39;c&#39; &#34;d&#34;"
    seen = Collector()
    seen.feed(escape("x_1 [y](z) 2 < 3 | über 你好"))
    assert seen.text == "x_1 [y](z) 2 < 3 | über 你好"


def test_a_text_of_line_ends_only_does_not_fill_a_page():
    html = table_html(pandas.DataFrame({"text": ["a" + "\n" * 47 + "b", "a\n\nb"]}))
    seen = Collector()
    seen.feed(html)
    assert "a\n[47 line ends]\nb" in seen.text and "a\n\nb" in seen.text


def test_token_colours_are_centred_at_zero():
    html = token_loss_html(losses(["a", "b", "c"]).assign(delta=[-1.0, 0.0, 1.0]))
    found = re.findall(r'background:rgb\((\d+),(\d+),(\d+)\)" title', html)
    (r0, _, b0), white, (r1, _, b1) = [tuple(map(int, c)) for c in found]
    assert white == (255, 255, 255) and b0 > r0 and r1 > b1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234, "1,234"),
        (1234.0, "1,234"),
        (0.123456, "0.1235"),
        (float("nan"), "n/a"),
        (float("inf"), "inf"),
        (True, "yes"),
        (None, ""),
        ("1234", "1234"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
    ],
)
def test_a_value_reads_the_same_in_a_cell_and_in_a_mapping(value: object, shown: str):
    for html in (table_html(pandas.DataFrame({"v": pandas.Series([value], dtype=object)})), table_html({"v": value})):
        assert f">{escape(shown)}</td>" in html


def test_numbers_stand_to_the_right_and_texts_to_the_left():
    number, text = re.findall(r'<td style="[^"]*text-align:(\w+)', table_html([{"number": 1, "text": "1"}]))
    assert (number, text) == ("right", "left")
