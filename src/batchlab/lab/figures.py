"""Figures as SVG text that takes its colours from the page around it, so one picture serves light, dark and print."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from batchlab.lab.comparison import Curve, Estimate

__all__ = [
    "COLORS",
    "Cell",
    "Line",
    "accuracy_curves",
    "interval_rows",
    "line_figure",
    "percentile_bands",
    "range_bars",
    "rate_search",
    "standalone",
    "table_figure",
]

COLORS: Final = ("#e8710a", "#2f7de1", "#12a37a", "#b052c9", "#8a8f98", "#c2185b", "#7a5c00", "#00838f")
# Stand-ins that no figure uses otherwise; `_to_svg` turns them into the page's own colours.
_INK, _GRID = "#010203", "#040506"
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: it scales, wraps in print and can be searched
    "font.size": 9,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@contextmanager
def _figure(name: str, rows: int = 1, height: float = 3.1) -> Iterator[tuple[Figure, list[Axes]]]:
    # The salt makes the ids of a figure's parts the same in every run, and different between figures of a page.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.8, height), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)
        yield figure, list(axes[:, 0])


def _to_svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: (\S+ )?([\d.]+px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", svg)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid, #8886)")
    start = svg.index(">") + 1
    text = description.replace("&", "&amp;").replace("<", "&lt;")
    return f"{svg[:start]}<title>{text}</title>{svg[start:]}"


def standalone(svg: str) -> str:
    """The figure with colours of its own for light and dark, for where no page around it sets them."""
    style = "svg{color:#1c2430}@media(prefers-color-scheme:dark){svg{color:#e4e9f0}}"
    return svg.replace("</title>", f"</title><style>{style}</style>", 1)


def _thousands(value: float, _: object) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _band(axes: Axes, steps: Sequence[int], low: Sequence[float], high: Sequence[float], color: str) -> None:
    if not any(math.isnan(value) for value in low):
        axes.fill_between(steps, low, high, color=color, alpha=0.22, linewidth=0)


def _legend_above(axes: Axes) -> None:
    # Outside, so that it never covers a curve, whatever the curves do.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.4)


def _log_steps(axes: Axes, first: int, last: int) -> None:
    axes.set_xscale("log")
    axes.set_xlim(first, last)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlabel("training steps (each ten times the last)")


def accuracy_curves(
    name: str,
    curves: Mapping[str, Curve],
    *,
    gap: tuple[float, float, float, str] | None = None,
    floor: float = 0.5,
    description: str,
) -> str:
    """Test accuracy against training steps, a line with its interval for each arm.

    Args:
        name: of the figure.
        curves: label -> curve, at most eight.
        gap: (accuracy, steps of the faster, steps of the slower, text): drawn as a horizontal measure between the arms.
        floor: lowest accuracy shown.
        description: for readers who do not see the picture.
    """
    with _figure(name) as (figure, (axes,)):
        for (label, curve), color in zip(curves.items(), COLORS, strict=False):
            axes.plot(curve.steps, curve.mean, color=color, label=label)
            _band(axes, curve.steps, curve.low, curve.high, color)
        last = max(curve.steps[-1] for curve in curves.values())
        _log_steps(axes, 10, last)
        axes.set_ylim(floor, 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylabel("test accuracy")
        if gap is not None:
            accuracy, faster, slower, text = gap
            axes.annotate(
                "", (faster, accuracy), (slower, accuracy), arrowprops={"arrowstyle": "<->", "color": _INK, "lw": 1.2}
            )
            axes.annotate(
                text,
                (math.sqrt(faster * slower), accuracy),
                # Below the faster curve and left of the slower one, where neither can be.
                (faster * 0.6, (floor + accuracy) / 2),
                ha="right",
                arrowprops={"arrowstyle": "-", "color": _INK, "lw": 0.6, "shrinkB": 3},
                fontsize=8.5,
            )
        _legend_above(axes)
        return _to_svg(figure, description)


def percentile_bands(
    name: str, arms: Mapping[str, tuple[Sequence[int], Sequence[Sequence[float]]]], *, description: str
) -> str:
    """The 15th, 50th and 85th percentile of one unit's input over time, a panel for each arm.

    Args:
        name: of the figure.
        arms: label -> (steps, for each the three percentiles).
        description: for readers who do not see the picture.
    """
    with _figure(name, rows=len(arms), height=1.9 * len(arms) + 0.5) as (figure, panels):
        for axes, (label, (steps, values)), color in zip(panels, arms.items(), COLORS, strict=False):
            low, middle, high = zip(*values, strict=True)
            axes.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
            axes.plot(steps, middle, color=color)
            axes.plot(steps, low, color=color, linewidth=0.8)
            axes.plot(steps, high, color=color, linewidth=0.8)
            axes.set_title(label, fontsize=9, loc="left")
            axes.set_ylabel("input to the sigmoid")
            _log_steps(axes, 10, steps[-1])
        for axes in panels[:-1]:
            axes.set_xlabel("")
        return _to_svg(figure, description)


def rate_search(
    name: str,
    arms: Mapping[str, Mapping[float, Sequence[float]]],
    chosen: Mapping[str, float],
    *,
    floor: float | None = None,
    description: str,
) -> str:
    """Validation accuracy against the learning rate: each run a dot, the mean a line, the chosen rate a ring.

    Args:
        name: of the figure.
        arms: label -> rate -> a score for each seed.
        chosen: label -> rate.
        floor: lowest accuracy shown; runs below it are drawn on the lower edge.
        description: for readers who do not see the picture.
    """
    with _figure(name) as (figure, (axes,)):
        scores = [score for rates in arms.values() for values in rates.values() for score in values]
        floor = max(0.0, min(scores) - 0.02) if floor is None else floor
        for (label, rates), color in zip(arms.items(), COLORS, strict=False):
            shown: dict[float, list[float]] = {rate: [max(v, floor) for v in values] for rate, values in rates.items()}
            means = {rate: sum(values) / len(values) for rate, values in shown.items()}
            axes.plot(list(means), list(means.values()), color=color, label=label, linewidth=1.2)
            for rate, values in shown.items():
                marks: Any = [rate] * len(values)
                axes.plot(marks, values, "o", color=color, markersize=4, clip_on=False)
            best = chosen[label]
            axes.plot([best], [means[best]], "o", markersize=12, markerfacecolor="none", markeredgecolor=color)
        axes.set_xscale("log")
        axes.set_ylim(floor, None)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if max(scores) - floor > 0.1 else 1))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation accuracy")
        _legend_above(axes)
        return _to_svg(figure, description)


@dataclass(frozen=True)
class Line:
    """Points with an interval each; `low` and `high` are empty where there is none.

    Args:
        x: positions.
        y: values.
        low: lower ends.
        high: upper ends.
        dashed: drawn as something computed rather than measured.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False


def line_figure(
    name: str,
    lines: Mapping[str, Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    percent: bool = False,
    limits: tuple[float | None, float | None] = (None, None),
    ticks: Sequence[float] = (),
    x_ticks: Sequence[float] = (),
    levels: Mapping[str, float] | None = None,
    description: str,
) -> str:
    """Lines with their intervals.

    Args:
        name: of the figure.
        lines: label -> line, at most eight.
        x_label: what the positions are, with their unit.
        y_label: what the values are, with their unit.
        log_x: logarithmic positions.
        log_y: logarithmic values.
        percent: values are shares, shown as per cent.
        limits: lowest and highest value shown.
        ticks: marks on the value axis; empty: chosen.
        x_ticks: marks on the position axis; empty: chosen.
        levels: values to draw a thin line at, by what to write there.
        description: for readers who do not see the picture.
    """
    with _figure(name) as (figure, (axes,)):
        for (label, line), color in zip(lines.items(), COLORS, strict=False):
            style = "--" if line.dashed else "-"
            mark = "o" if len(line.x) <= 12 else None
            axes.plot(line.x, line.y, color=color, label=label, linestyle=style, marker=mark, markersize=3.5)
            if len(line.low) and not any(math.isnan(value) for value in line.low):
                axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.2, linewidth=0)
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if log_y:
            axes.set_yscale("log")
        axes.set_ylim(*limits)
        if x_ticks:
            axes.set_xticks(list(x_ticks))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if log_y:
            low, high = axes.get_ylim()
            if high < 100 * low:  # powers of ten alone would leave the axis with one number
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if ticks:
            axes.set_yticks(list(ticks))
            axes.minorticks_off()
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        elif log_y:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for text, value in (levels or {}).items():
            axes.axhline(value, color=_INK, linewidth=0.7, linestyle=":")
            axes.annotate(text, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend_above(axes)
        return _to_svg(figure, description)


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
    with _figure(name, height=0.26 * len(bars) + 0.8) as (figure, (axes,)):
        for row, (label, bar) in enumerate(bars.items()):
            color = COLORS[(groups or {}).get(label, 0)]
            if bar is not None:
                axes.plot(bar, (row, row), color=color, linewidth=7, alpha=0.45, solid_capstyle="round")
            if label in marks:
                axes.plot([marks[label]], [row], "o", color=color if bar else _INK, markersize=5)
        axes.set_xscale("log")
        axes.set_xlim(*limits)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_yticks(range(len(bars)), list(bars))
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
        return _to_svg(figure, description)


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
    with _figure(name, height=0.34 * len(rows) + 0.8) as (figure, (axes,)):
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
        return _to_svg(figure, description)


def interval_rows(
    name: str,
    groups: Mapping[str, Mapping[str, Estimate]],
    rows: Sequence[str],
    *,
    x_label: str,
    levels: Mapping[str, float],
    description: str,
) -> str:
    """A row for each thing, with a mark and an interval for each group.

    Args:
        name: of the figure.
        groups: label -> row -> value as a share; rows may be missing.
        rows: from top to bottom.
        x_label: what the values are.
        levels: values to draw a thin line at, by what to write there; all of them are shown.
        description: for readers who do not see the picture.
    """
    with _figure(name, height=0.9 + 0.32 * len(rows)) as (figure, (axes,)):
        shown = [value.mean for values in groups.values() for value in values.values()] + list(levels.values())
        margin = 0.2 * (max(shown) - min(shown)) or 1.0
        axes.set_xlim(min(shown) - margin, max(shown) + margin)
        for place, ((label, values), color, marker) in enumerate(zip(groups.items(), COLORS, "osD^", strict=False)):
            offset = 0.3 * (place - (len(groups) - 1) / 2)
            for row, value in values.items():
                y = rows.index(row) + offset
                if value.low == value.low:
                    axes.plot([value.low, value.high], [y, y], color=color, linewidth=1.4)
                axes.plot([value.mean], [y], marker, color=color, markersize=5)
            axes.plot([], [], marker, color=color, markersize=5, label=label)
        for text, level in levels.items():
            axes.axvline(level, color=_INK, linewidth=0.8, linestyle=":")
            axes.annotate(text, (level, 0), xycoords=("data", "axes fraction"), ha="left", va="bottom", fontsize=8)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.2, -0.6)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel(x_label)
        _legend_above(axes)
        return _to_svg(figure, description)
