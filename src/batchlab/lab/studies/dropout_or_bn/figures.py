"""The figures of the study dropout-or-bn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.ticker import FuncFormatter

from batchlab.lab.comparison import Estimate, mean_curve
from batchlab.lab.figures import COLORS, Line, line_figure, rate_search
from batchlab.lab.figures.style import INK, drawing, to_svg
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_or_bn.arms import Arm, named_arms
from batchlab.lab.studies.dropout_or_bn.settings import DropoutOrBnSettings
from batchlab.lab.studies.dropout_or_bn.summary import Summary

__all__ = ["figures", "interval_figure"]


def interval_figure(
    name: str,
    groups: Sequence[Mapping[str, Estimate]],
    *,
    level: float,
    x_label: str,
    unit: str = " %",
    description: str,
) -> str:
    """A point with its interval for each row, a colour for each group.

    Args:
        name: of the figure.
        groups: row -> its estimate; a space between groups.
        level: where a thin line is drawn to compare with.
        x_label: what the estimates are; they are shares, shown as per cent.
        unit: behind each number of the axis; "" for differences, in percentage points.
        description: for readers who do not see the picture.
    """
    filled = [group for group in groups if group]
    count = sum(map(len, filled)) + 0.6 * (len(filled) - 1)
    with drawing(name, height=0.21 * count + 0.7) as (figure, (axes,)):
        place, places, labels = 0.0, [], []
        for group, color in zip(filled, COLORS, strict=False):
            for label, value in group.items():
                if not math.isnan(value.low):
                    axes.plot([value.low, value.high], [place, place], color=color, linewidth=1.6)
                axes.plot([value.mean], [place], "o", color=color, markersize=5)
                places.append(place)
                labels.append(label)
                place += 1
            place += 0.6
        axes.axvline(level, color=INK, linewidth=0.7, linestyle=":")
        # One wide interval must not squeeze all others: what leaves the frame is cut off.
        means = [level, *(value.mean for group in filled for value in group.values())]
        ends = [end for group in filled for value in group.values() for end in (value.low, value.high) if end == end]
        reach = max(means) - min(means) or 0.01
        margin = 0.04 * reach
        left, right = min([*means, *ends]) - margin, max([*means, *ends]) + margin
        axes.set_xlim(max(left, min(means) - reach), min(right, max(means) + reach))
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}{unit}"))
        axes.set_xlabel(x_label)
        return to_svg(figure, description)


def _grouped(settings: DropoutOrBnSettings, values: Mapping[str, Estimate]) -> list[dict[str, Estimate]]:
    """Rows by label: no batch norm, batch norm and dropout, batch norm and batchwise dropout, convolutional."""
    groups: list[dict[str, Estimate]] = [{}, {}, {}, {}]
    for name, value in values.items():
        arm = named_arms(settings)[name]
        index = 3 if arm.convolutional else 0 if not arm.batch_norm else 2 if arm.dropout == "batchwise" else 1
        groups[index][arm.label] = value
    return groups


def _test_error(finished: Finished) -> str:
    settings: DropoutOrBnSettings = finished.settings
    share = settings.shares[-1]
    arms = [
        *(Arm(), Arm(False, "independent", share), Arm(False, "batchwise", share), Arm(True)),
        *(Arm(True, "independent", share), Arm(True, "batchwise", share)),
    ]
    lines = {}
    for arm in arms:
        runs = [record for record in finished.runs(arm.name) if not record.diverged]
        if runs:
            curve = mean_curve(runs)
            bands = [1 - v for v in curve.high[1:]], [1 - v for v in curve.low[1:]]
            lines[arm.label] = Line(curve.steps[1:], [1 - v for v in curve.mean[1:]], *bands)
    return line_figure(
        "test-error",
        lines,
        x_label="training steps",
        y_label="test error",
        log_y=True,
        percent=True,
        description="Test error against training steps for " + "; ".join(lines),
    )


def _group(arm: Arm) -> int:
    return 3 if arm.convolutional else 2 if arm.dropout == "batchwise" else int(arm.batch_norm)


def _short(arm: Arm) -> str:
    """The label without what the group's caption says: a legend has room for two columns of some 25 letters."""
    if arm.dropout == "batchwise":
        return arm.label.replace(f" {arm.share:g}", "")
    return arm.label.removeprefix("BN + ").removeprefix("conv: ")


def _rates(finished: Finished) -> dict[str, str]:
    arms = named_arms(finished.settings)
    drawn = {}
    for index in range(4):
        names = [name for name, arm in arms.items() if _group(arm) == index]
        if not names:
            continue
        best = max(max(scores) for name in names for scores in finished.scores[name].values())
        drawn[f"rate-search-{index + 1}"] = rate_search(
            f"rate-search-{index + 1}",
            {_short(arms[name]): finished.scores[name] for name in names},
            {_short(arms[name]): finished.chosen[name] for name in names},
            floor=max(0.0, round(best - 0.15, 2)),
            description="Validation accuracy against learning rate, the chosen rate ringed",
        )
    return drawn


def figures(finished: Finished, summary: Summary) -> dict[str, str]:
    """Every figure of the report, by name."""
    settings: DropoutOrBnSettings = finished.settings
    repairs = {name: found.repair for name, found in summary.statistics.items()}
    drawn = {
        "errors": interval_figure(
            "errors",
            _grouped(settings, summary.errors),
            level=summary.errors["bn"].mean,
            x_label="test error",
            description="Test error of each network with its 95 % interval",
        ),
        "recalibration": interval_figure(
            "recalibration",
            _grouped(settings, repairs),
            level=0.0,
            x_label="change of the test error, points",
            unit="",
            description="What new statistics, taken with dropout off, change",
        ),
        "test-error": _test_error(finished),
    }
    return drawn | _rates(finished)
