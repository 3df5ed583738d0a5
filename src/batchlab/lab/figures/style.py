"""How figures look: SVG text that takes its colours from the page around it, for light, dark and print."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

__all__ = [
    "COLORS",
    "INK",
    "band",
    "drawing",
    "legend_above",
    "log_steps",
    "standalone",
    "thousands",
    "to_svg",
]

COLORS: Final = ("#e8710a", "#2f7de1", "#12a37a", "#b052c9", "#8a8f98", "#c2185b", "#7a5c00", "#00838f")
# Stand-ins that no figure uses otherwise; `to_svg` turns them into the page's own colours.
INK, _GRID = "#010203", "#040506"
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: it scales, wraps in print and can be searched
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@contextmanager
def drawing(name: str, rows: int = 1, height: float = 3.1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of that name and its panels, one above the other, in the style of them all."""
    # The salt makes the ids of a figure's parts the same in every run, and different between figures of a page.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.8, height), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)
        yield figure, list(axes[:, 0])


def to_svg(figure: Figure, description: str) -> str:
    """The figure as SVG without a size of its own; the description is for readers who do not see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: (\S+ )?([\d.]+px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", svg)
    svg = svg.replace(INK, "currentColor").replace(_GRID, "var(--grid, #8886)")
    start = svg.index(">") + 1
    text = description.replace("&", "&amp;").replace("<", "&lt;")
    return f"{svg[:start]}<title>{text}</title>{svg[start:]}"


def standalone(svg: str) -> str:
    """The figure with colours of its own for light and dark, for where no page around it sets them."""
    style = "svg{color:#1c2430}@media(prefers-color-scheme:dark){svg{color:#e4e9f0}}"
    return svg.replace("</title>", f"</title><style>{style}</style>", 1)


def thousands(value: float, _: object) -> str:
    """A tick label: 20k for 20,000."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def band(axes: Axes, steps: Sequence[int], low: Sequence[float], high: Sequence[float], color: str) -> None:
    """An interval around a curve; nothing where one seed has none."""
    if not any(math.isnan(value) for value in low):
        axes.fill_between(steps, low, high, color=color, alpha=0.22, linewidth=0)


def legend_above(axes: Axes) -> None:
    """The legend over the panel."""
    # Outside, so that it never covers a curve, whatever the curves do.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.4)


def log_steps(axes: Axes, first: int, last: int) -> None:
    """Training steps on a logarithmic axis."""
    axes.set_xscale("log")
    axes.set_xlim(first, last)
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.set_xlabel("training steps (each ten times the last)")
