"""Parts of pages: documents, tables, pictures, and escaped text."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mythos.generation.depth_view import harmless
from mythos.reports.figures import inline_svg
from mythos.reports.style import Entry, Panel, separate

NUMBER = re.compile("[-+]?[0-9]|nan$|inf$")
"""How cells of numbers begin."""
STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --dim: #5c5c5c; --line: #ccc; --back: #fff }
@media (prefers-color-scheme: dark) { :root { --text: #e4e4e4; --dim: #a5a5a5; --line: #484848; --back: #16181c } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: var(--text);
       background: var(--back) }
h1 { margin-bottom: 0 }
h2 { margin-top: 2em; border-bottom: 1px solid var(--line) }
.dim { color: var(--dim); margin-top: 0 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(13em, 1fr)); gap: .8em 1.5em }
dt { color: var(--dim); font-size: 13px }
dd { margin: 0; font-size: 18px; font-variant-numeric: tabular-nums }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30em, 100%), 1fr)); gap: 1em }
figure { margin: 0 }
svg { width: 100%; height: auto; fill: currentColor; stroke-linejoin: round; stroke-linecap: butt }
.scroll { max-height: 26em; overflow: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1em 0 }
th, td { padding: .15em 1em .15em 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
.number { text-align: right }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px }
summary { cursor: pointer }
"""


def document(title: str, intro: str, sections: Iterable[tuple[str, str]], head: str) -> str:
    """A whole page: a heading, `intro`, and the sections that are not empty. All but the title is HTML."""
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{content}\n</section>" for name, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{head}\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{intro}\n{body}\n</body>\n</html>\n"
    )


class Pictures:
    """Converts figures to svg elements whose ids are unique in the page."""

    def __init__(self) -> None:
        self.count = 0

    def row(self, panels: Iterable[Panel], key: Sequence[Entry] = ()) -> str:
        """Plots side by side, as many as there is room for; empty for no plots."""
        elements = []
        for figure in separate(panels, key):
            self.count += 1
            elements.append(f"<figure>{inline_svg(figure, f'figure-{self.count}')}</figure>")
        return '<div class="figures">\n' + "\n".join(elements) + "\n</div>\n" if elements else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text cells that scrolls if it is long; columns of numbers are aligned on the right."""
    rows = list(rows)
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    kinds = [' class="number"' * all(NUMBER.match(cell) for cell in column if cell) for column in columns]

    def line(cells: Sequence[str], tag: str) -> str:
        shown = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>\n{line(header, "th")}\n{body}\n</table></div>'


def folded(title: str, content: str, opened: bool = False) -> str:
    """An element that unfolds on a click."""
    return f"<details{' open' * opened}><summary>{escape(title)}</summary>\n{content}\n</details>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of a class of the style sheet; empty for no text."""
    start = f'<p class="{kind}">' if kind else "<p>"
    return f"{start}{escape(text)}</p>\n" if text else ""


def code(text: str) -> str:
    """Preformatted text."""
    return f"<pre>{escape(text)}</pre>"


def escape(text: Any) -> str:
    """Escape text for HTML; control characters are shown as symbols."""
    return html.escape(harmless(str(text)))
