"""One HTML page that opens offline: its style inside, nothing loaded, no script allowed."""

from collections.abc import Mapping

from tinylab.html.escape import escape

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{margin-top:2.4rem;border-bottom:2px solid #0072B2;padding-bottom:.2rem}
table{border-collapse:collapse;margin:.8rem 0;font-size:.88rem;display:block;overflow-x:auto}
th,td{border-bottom:1px solid #ddd}th{background:#f4f6f8}
pre{background:#f7f7f7;padding:.8rem;overflow:auto;font-size:.82rem}
figure{margin:1.2rem 0}figcaption{color:#666;font-size:.85rem}.note{color:#666}nav a{margin-right:1rem}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page_html(title: str, note: str, sections: Mapping[str, str]) -> str:
    """A whole document: title, a grey note, links to the sections, then each section's heading and HTML."""
    links = "".join(f'<a href="#s{i}">{escape(heading)}</a>' for i, heading in enumerate(sections))
    body = "".join(f'<h2 id="s{i}">{escape(h)}</h2>{content}' for i, (h, content) in enumerate(sections.items()))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f'<body><h1>{escape(title)}</h1><p class="note">{escape(note)}</p><nav>{links}</nav>{body}</body></html>\n'
    )
