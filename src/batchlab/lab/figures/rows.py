"""Figures with a row for each arm: ranges, intervals, coloured fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, PercentFormatter

from batchlab.lab.comparison import Estimate
from batchlab.lab.figures.style import COLORS, INK, drawing, legend_above, to_svg

__all__ = [
    "Cell",
    "interval_rows",
    "range_bars",
    "table_figure",
]


def range_bars(
    name: str,
    bars: Mapping[str, tuple[float, float] | None],
    marks: Mapping[str, float],
    *,
    limits: tuple[float, float],
    x_label: str,
    groups: Mapping[str, int] | None = None,
    description: str,
) -> str:
    """A horizontal bar from the lowest to the highest value of each row, on a logarithmic axis.

    Args:
        name: of the figure.
        bars: label -> lowest and highest value; None: an empty row.
        marks: label -> a value to mark on its row.
        limits: lowest and highest value shown.
        x_label: what the values are.
        groups: label -> which colour; None: all alike.
        description: for readers who do not see the picture.
    """
    with drawing(name, height=0.26 * len(bars) + 0.8) as (figure, (axes,)):
        for row, (label, bar) in enumerate(bars.items()):
            color = COLORS[(groups or {}).get(label, 0)]
            if bar is not None:
                axes.plot(bar, (row, row), color=color, linewidth=7, alpha=0.45, solid_capstyle="round")
            if label in marks:
                axes.plot([marks[label]], [row], "o", color=color if bar else INK, markersize=5)
        axes.set_xscale("log")
        axes.set_xlim(*limits)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_yticks(range(len(bars)), list(bars))
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
        return to_svg(figure, description)


@dataclass(frozen=True)
class Cell:
    """A field of a `table_figure`.

    Args:
        text: what is written in it.
        color: of `COLORS`, its number.
        shade: how strong the colour is, from 0 to 1.
    """

    text: str
    color: int
    shade: float


def table_figure(
    name: str,
    panels: Mapping[str, Sequence[Sequence[Cell]]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    x_label: str,
    description: str,
) -> str:
    """Coloured fields in rows and columns, the panels side by side.

    Args:
        name: of the figure.
        panels: title -> rows of fields.
        rows: what stands left of each.
        columns: what stands under each.
        x_label: what the columns are.
        description: for readers who do not see the picture.
    """
    with drawing(name, height=0.34 * len(rows) + 0.8) as (figure, (axes,)):
        starts = [index * (len(columns) + 0.4) for index in range(len(panels))]
        for left, (title, lines) in zip(starts, panels.items(), strict=True):
            axes.text(left, -0.15, title, ha="left", va="bottom")
            for top, line in enumerate(lines):
                for place, cell in enumerate(line):
                    corner, color = (left + place + 0.03, top + 0.04), COLORS[cell.color]
                    axes.add_patch(Rectangle(corner, 0.94, 0.92, color=color, alpha=0.12 + 0.5 * cell.shade, lw=0))
                    axes.text(left + place + 0.5, top + 0.5, cell.text, ha="center", va="center", fontsize=8)
        axes.set_xlim(0, starts[-1] + len(columns))
        axes.set_ylim(len(rows), -0.6)
        axes.set_xticks(
            [left + place + 0.5 for left in starts for place in range(len(columns))], [*columns] * len(panels)
        )
        axes.set_yticks([top + 0.5 for top in range(len(rows))], rows)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(x_label)
        return to_svg(figure, description)


def interval_rows(
    name: str,
    groups: Mapping[str, Mapping[str, Estimate]],
    rows: Sequence[str],
    *,
    x_label: str,
    levels: Mapping[str, float],
    description: str,
) -> str:
    """A row for each thing, with a mark and an interval for each group; one beyond the edge ends in an arrow.

    Args:
        name: of the figure.
        groups: label -> row -> value as a share; rows may be missing.
        rows: from top to bottom.
        x_label: what the values are.
        levels: values to draw a thin line at, by what to write there; all of them are shown.
        description: for readers who do not see the picture.
    """
    with drawing(name, height=0.9 + 0.32 * len(rows)) as (figure, (axes,)):
        shown = [value.mean for values in groups.values() for value in values.values()] + list(levels.values())
        margin = 0.2 * (max(shown) - min(shown)) or 1.0
        edges = min(shown) - margin, max(shown) + margin
        axes.set_xlim(*edges)
        for place, ((label, values), color, marker) in enumerate(zip(groups.items(), COLORS, "osD^", strict=False)):
            offset = 0.3 * (place - (len(groups) - 1) / 2)
            for row, value in values.items():
                y = rows.index(row) + offset
                if value.low == value.low:
                    axes.plot([value.low, value.high], [y, y], color=color, linewidth=1.4)
                    if value.low < edges[0]:
                        axes.plot([edges[0]], [y], "<", color=color, markersize=5, clip_on=False)
                    if value.high > edges[1]:
                        axes.plot([edges[1]], [y], ">", color=color, markersize=5, clip_on=False)
                axes.plot([value.mean], [y], marker, color=color, markersize=5)
            axes.plot([], [], marker, color=color, markersize=5, label=label)
        for text, level in levels.items():
            axes.axvline(level, color=INK, linewidth=0.8, linestyle=":")
            axes.annotate(text, (level, 0), xycoords=("data", "axes fraction"), ha="left", va="bottom", fontsize=8)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.2, -0.6)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel(x_label)
        legend_above(axes)
        return to_svg(figure, description)
