"""Pieces of self-contained HTML pages: every text is escaped, pictures lie inside, nothing is fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image, ImageOps

from vlmtune.data.images import decode
from vlmtune.data.sample import ImageRef
from vlmtune.errors import ImageError
from vlmtune.inspection.findings import Histogram

THUMBNAIL = 144
STYLE = """
:root {
  color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1d2329; --soft: #5d6873; --line: #d9dee4;
  --bar: #4a7ab5; --good: #1f7a45; --bad: #b3261e; --warn: #8f5a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1d2125; --ink: #e4e8ec; --soft: #9aa5b0; --line: #343b42;
    --bar: #6f9fd8; --good: #58c083; --bad: #ff8a80; --warn: #e8b04b;
  }
}
body {
  font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--page); color: var(--ink);
}
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .12rem .8rem .12rem 0; vertical-align: top; }
th { font-weight: 400; color: var(--soft); }
td.n, .bars td:first-child { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars { width: 100%; } .bars td.b { width: 99%; } .bars td.n { padding-right: 0; }
.bars i { display: block; height: .8rem; margin-top: .3rem; background: var(--bar); border-radius: 2px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.4rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.card, .tile, .finding { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.card { padding: .9rem 1rem; overflow-wrap: anywhere; }
.tile { padding: .6rem .8rem; color: var(--soft); }
.tile strong { display: block; color: var(--ink); font-size: 1.35rem; font-weight: 600; line-height: 1.3; }
.verdict { padding: .7rem 1rem; border-radius: 8px; border-left: 6px solid; background: var(--card); font-weight: 600; }
.verdict ul { font-weight: 400; margin: .3rem 0 0; padding-left: 1.2rem; }
.ok { border-color: var(--good); } .no { border-color: var(--bad); }
.finding { padding: .7rem 1rem; margin: .6rem 0; border-left: 4px solid var(--line); }
.finding.error { border-left-color: var(--bad); } .finding.warning { border-left-color: var(--warn); }
.level { font-size: .75rem; font-weight: 600; text-transform: uppercase; letter-spacing: .04em; margin-right: .5rem; }
.level.error { color: var(--bad); } .level.warning { color: var(--warn); } .level.note, .advice { color: var(--soft); }
summary { cursor: pointer; } details { color: var(--soft); margin-top: .3rem; }
details ul { margin: .3rem 0; padding-left: 1.2rem; } details li { overflow-wrap: anywhere; }
figure { display: inline-block; margin: .6rem .6rem 0 0; width: 9rem; vertical-align: top; }
figure img, .none { max-width: 100%; border: 1px solid var(--line); border-radius: 4px; display: block; }
.none { height: 5rem; line-height: 5rem; text-align: center; color: var(--soft); border-style: dashed; }
figcaption { font-size: .75rem; color: var(--soft); overflow-wrap: anywhere; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """Return a whole page.

    Args:
        title: plain text.
        body: HTML.
        style: CSS besides the common one.
    """
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and values; whole numbers get thousands separators."""
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(shown(value))}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def shown(value: object) -> str:
    """A value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(count)}" for name, count in value.items()) or "none"
    return str(value)


def tiles(rows: Iterable[tuple[str, object]]) -> str:
    """Return the numbers that a person looks at first."""
    cells = (f'<div class="tile"><strong>{escape(shown(value))}</strong>{escape(name)}</div>' for name, value in rows)
    return f'<div class="tiles">{"".join(cells)}</div>'


def bars(histogram: Histogram) -> str:
    """Return a histogram as a table with bars."""
    most = max((count for _, count in histogram), default=0) or 1
    rows = (
        f'<tr><td>{escape(label)}</td><td class="b"><i style="width:{count / most:.1%}"></i></td>'
        f'<td class="n">{count:,}</td></tr>'
        for label, count in histogram
    )
    return f'<table class="bars">{"".join(rows)}</table>'


def items(texts: Sequence[str], more: int = 0) -> str:
    """Return a list of texts."""
    rest = f"<li>and {more:,} more</li>" if more > 0 else ""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}{rest}</ul>"


def figure(ref: ImageRef, caption: str) -> str:
    """Return a thumbnail with its caption, or the caption alone where the image cannot be decoded."""
    try:
        picture = f'<img src="{data_address(small(ref))}" alt="{escape(caption)}">'
    except ImageError:
        picture = '<div class="none">cannot be shown</div>'
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def small(ref: ImageRef) -> Image.Image:
    """Return an image at thumbnail size.

    Raises:
        ImageError: it cannot be decoded.
    """
    return ImageOps.contain(decode(ref), (THUMBNAIL, THUMBNAIL))


def data_address(image: Image.Image, format: str = "JPEG") -> str:
    """Return an image as a ``data:`` address."""
    buffer = io.BytesIO()
    image.save(buffer, format, quality=80)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
