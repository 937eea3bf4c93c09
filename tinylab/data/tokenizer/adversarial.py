"""Texts on which tokenizers that look alike differ: what every engine is compared on before it is used."""

_CODE = """class Reader:
    def __init__(self, path, *, size=4096):
        self.path = path
        if size is None:
            for i in range(0, 10):
                    import os    # deep indent, two spaces before the comment
        return

\tdef tabbed(x):
\t\treturn {"a": [1, 2.5, 0x1F], 'b': "\\n\\t"}
"""

SAMPLE: tuple[str, ...] = (
    "",
    " ",
    "a",
    "Hello, world! The quick brown fox jumps over the lazy dog.",
    _CODE,
    _CODE.replace("    ", "  "),
    _CODE.replace("\n", "\r\n"),
    *(" " * n + "import numpy as np" for n in range(1, 21)),
    *("x\n" + " " * n + "return self.value" for n in range(1, 21)),
    *(" " * n for n in (2, 3, 5, 8, 13, 16, 31, 32, 33, 64, 129)),
    "a  b   c    d     e      f       g",
    "trailing spaces   ",
    "two  spaces. Then\n\n\nthree newlines\n",
    "\n",
    "\n\n \n  \n",
    "\t",
    "\t\tx = 1\t# tab\t\tcomment",
    " \t \t mixed",
    "line\r\nline\rline\n",
    "0 1 12 123 1234567890 3.14159 1e-5 0xFF 1,000,000 2023-09-16T00:00:00Z",
    "v1.1.0-rc2 a1b2c3 ½ ² ٣ 五 ⅷ",
    "中文分词没有空格。日本語のテキスト、カタカナ。한국어 문장입니다.",
    "Привет, мир! Ελληνικά. שלום עולם. مرحبا بالعالم. हिन्दी नमस्ते ไทย",
    "emoji 😀 🎉 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️",
    "rare: 𓀀 𝕏 ꙮ \U0010ffff \ue000",
    "nul \0 between \0\0 and \x01\x02\x1f\x7f\x80 controls",
    "combining e\u0301 a\u0308 o\u0302\u0323 \u1e69 s\u0323\u0307 zalgo z\u0351\u036b\u0343",
    "bidi \u202eabc\u202c \u2066def\u2069 \u200f\u200e",
    "zero\u200bwidth\u200cjoin\u200der\ufeff nbsp\u00a0thin\u2009ideographic\u3000space\u2028line\u2029par\u0085next",
    "<s> a document that writes </s> and <unk> and <pad> as text <s></s>",
    "<|endoftext|> <|begin_of_text|> [INST] <<SYS>> <0x0A> <0xFF> <0x0a>",
    "▁",
    "▁▁ a▁b ▁c",
    "ﬁ ﬂ Å Å ① ｆｕｌｌ ㌔ ß ẞ İ ı",
    "https://example.org/a/b?c=d&e=f#g user@example.com C:\\Windows\\ /usr/lib/x86_64",
    "don't we'll I'm they've it's 'quoted' “curly” ‘single’ — – … «»",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "----------------====================________________****************",
    "{{{{[[[[((((<<<<>>>>))))]]]]}}}} ;;; ::: !!! ???",
    "CamelCaseIdentifier snake_case_identifier SCREAMING_CASE kebab-case",
    "\\begin{equation} \\frac{a}{b} \\end{equation} $x_i^2$",
    "    leading and\n        deeper\n            deepest\n    back",
)
"""Indents of 1–20 spaces with words, runs of spaces, tabs, CRLF, digits, scripts, emoji, NUL, bidi, `<s>`, `▁`."""
