"""Figures of curves: over training steps, over learning rates, over anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from batchlab.lab.comparison import Curve
from batchlab.lab.figures.style import COLORS, INK, band, drawing, legend_above, log_steps, to_svg

__all__ = [
    "Line",
    "accuracy_curves",
    "line_figure",
    "percentile_bands",
    "rate_search",
]


_MARKS: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def _spread(axes: Axes, floor: float, best: float) -> None:
    """Accuracies on the scale of log(a / (1 - a)): the step from 97 to 98 %, a third of all errors, is not lost."""
    top = min(0.9999, 1 - (1 - best) / 1.4)
    axes.set_yscale("logit", nonpositive="clip")
    axes.set_ylim(floor, max(top, floor + 0.01))
    axes.yaxis.set_major_locator(FixedLocator([mark for mark in _MARKS if floor <= mark <= top]))
    axes.yaxis.set_minor_locator(NullLocator())


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
    with drawing(name) as (figure, (axes,)):
        for (label, curve), color in zip(curves.items(), COLORS, strict=False):
            axes.plot(curve.steps, curve.mean, color=color, label=label)
            band(axes, curve.steps, curve.low, curve.high, color)
        last = max(curve.steps[-1] for curve in curves.values())
        log_steps(axes, 10, last)
        if floor < min(_MARKS):
            axes.set_ylim(floor, 1.0)
            axes.set_ylabel("test accuracy")
        else:
            _spread(axes, floor, max(max(curve.mean) for curve in curves.values()))
            axes.set_ylabel("test accuracy (logit scale)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        if gap is not None:
            accuracy, faster, slower, text = gap
            axes.annotate(
                "", (faster, accuracy), (slower, accuracy), arrowprops={"arrowstyle": "<->", "color": INK, "lw": 1.2}
            )
            axes.annotate(
                text,
                (math.sqrt(faster * slower), accuracy),
                # Below the faster curve and left of the slower one, where neither can be.
                (faster * 0.6, (floor + accuracy) / 2),
                ha="right",
                arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.6, "shrinkB": 3},
                fontsize=8.5,
            )
        legend_above(axes)
        return to_svg(figure, description)


def percentile_bands(
    name: str, arms: Mapping[str, tuple[Sequence[int], Sequence[Sequence[float]]]], *, description: str
) -> str:
    """The 15th, 50th and 85th percentile of one unit's input over time, a panel for each arm.

    Args:
        name: of the figure.
        arms: label -> (steps, for each the three percentiles).
        description: for readers who do not see the picture.
    """
    with drawing(name, rows=len(arms), height=1.9 * len(arms) + 0.5) as (figure, panels):
        for axes, (label, (steps, values)), color in zip(panels, arms.items(), COLORS, strict=False):
            low, middle, high = zip(*values, strict=True)
            axes.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
            axes.plot(steps, middle, color=color)
            axes.plot(steps, low, color=color, linewidth=0.8)
            axes.plot(steps, high, color=color, linewidth=0.8)
            axes.set_title(label, fontsize=9, loc="left")
            axes.set_ylabel("input to the sigmoid")
            log_steps(axes, 10, steps[-1])
        for axes in panels[:-1]:
            axes.set_xlabel("")
        return to_svg(figure, description)


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
    with drawing(name) as (figure, (axes,)):
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
        legend_above(axes)
        return to_svg(figure, description)


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
    with drawing(name) as (figure, (axes,)):
        for index, ((label, line), color) in enumerate(zip(lines.items(), COLORS, strict=False)):
            style = "--" if line.dashed else "-"
            mark = "o" if len(line.x) <= 12 else None
            # Each a little thinner than those below it: where they coincide, all of them are seen.
            width = 1.8 + 0.25 * (min(len(lines), len(COLORS)) - 1 - index)
            axes.plot(line.x, line.y, style, color=color, label=label, linewidth=width, marker=mark, markersize=3.5)
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
            axes.axhline(value, color=INK, linewidth=0.7, linestyle=":")
            axes.annotate(text, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        legend_above(axes)
        return to_svg(figure, description)
