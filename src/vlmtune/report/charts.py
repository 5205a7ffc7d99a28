"""Charts as SVG for a page: matplotlib draws them, the page's style sheet colors them for light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from vlmtune.errors import MissingDependencyError

# Colors that matplotlib draws with, and what stands for them on the page.
INK, GRID = "#010203", "#040506"
SERIES = tuple(f"#0a0b{number:02x}" for number in range(6))
MARKERS = "osD^vP"
# In inches: on a phone a chart shrinks to three quarters, and its words stay legible.
WIDTH = 4.6
_ON_PAGE = {INK: "currentColor", GRID: "var(--grid)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(SERIES)
}
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlmtune",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


Scale = Literal["plain", "from zero", "share", "percent", "log"]


@dataclass(frozen=True)
class Line:
    """A curve: its name and its (step, value) points."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Dot:
    """A value with its interval, drawn in the color of series ``series``."""

    value: float
    low: float
    high: float
    series: int


def line_chart(title: str, lines: Sequence[Line], *, scale: Scale = "plain") -> str:
    """Return an SVG of curves over steps; single points are drawn as dots."""

    def draw(axes: Any) -> None:
        from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

        for number, line in enumerate(lines, 1):
            steps, values = zip(*line.points, strict=True)
            marker = MARKERS[number % len(MARKERS)] if len(steps) < 15 else ""
            color = SERIES[number % len(SERIES)]
            axes.plot(steps, values, color=color, marker=marker, markersize=4, linewidth=1.6, label=line.name)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.02)
        if scale == "log" and all(value > 0 for line in lines for _, value in line.points):
            # The usual labels are formulas, which are off here for the sake of names with dollar signs.
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        elif scale in ("from zero", "share"):
            top = max(value for line in lines for _, value in line.points)
            axes.set_ylim(0, top * 1.1 or 1)
        if scale in ("share", "percent"):
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        if len(lines) > 1:
            axes.legend(fontsize=9)

    ends = [f"{one.name} goes from {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in lines]
    return _svg(draw, (WIDTH, 2.7), f"Chart of {title} over the steps: {'; '.join(ends)}.")


def interval_chart(rows: Sequence[tuple[str, Sequence[Dot]]], label: str, *, percent: bool) -> str:
    """Return an SVG of values with intervals, a row per name, the first on top."""
    spread = 0.32

    def draw(axes: Any) -> None:
        factor = 100 if percent else 1
        for place, (_, dots) in enumerate(rows):
            for number, dot in enumerate(dots):
                y = place + (spread * (number / (len(dots) - 1) - 0.5) if len(dots) > 1 else 0)
                color = SERIES[dot.series % len(SERIES)]
                axes.plot([dot.low * factor, dot.high * factor], [y, y], color=color, linewidth=2.4, alpha=0.55)
                marker = MARKERS[dot.series % len(MARKERS)]
                axes.plot([dot.value * factor], [y], marker, color=color, markersize=7)
        axes.set_yticks(range(len(rows)), [name if len(name) < 24 else name[:22] + "…" for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        if percent:
            axes.set_xlim(-2, 102)

    factor = 100 if percent else 1
    said = [f"{name}: {', '.join(f'{dot.value * factor:.3g}' for dot in dots)}" for name, dots in rows]
    return _svg(draw, (WIDTH, 0.75 + 0.42 * len(rows)), f"Chart of {label}. {'; '.join(said)}.")


def _svg(draw: Any, size: tuple[float, float], said: str) -> str:
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "The report's charts need matplotlib. Install it by: pip install 'vlmtune[report]'."
        ) from error
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(file.getvalue(), said)


def _for_page(svg: str, said: str) -> str:
    """Keep the drawing alone: colors by style sheet, the page's font, no ids that would stand twice on a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g|<text) id="[\w.]+"', r"\1", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for color, on_page in _ON_PAGE.items():
        svg = svg.replace(color, on_page)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', opening)
    width = re.search(r'width="([\d.]+)pt"', opening)
    pixels = round(float(width[1]) * 4 / 3) if width else 600
    view = box[1] if box else "0 0 460 270"
    return f'<svg viewBox="{view}" width="{pixels}" role="img" aria-label="{escape(said, quote=True)}">{rest.strip()}'
