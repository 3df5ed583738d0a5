"""The figures of the study why: shift and landscape over training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from batchlab.lab.comparison import estimate
from batchlab.lab.figures import Line, line_figure
from batchlab.lab.records import RunRecord
from batchlab.lab.studies.arm_results import arm_figures
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.why.measures import geometric_mean, of_line
from batchlab.lab.studies.why.settings import ARMS, NETWORKS, NORMALIZATIONS, arm_of
from batchlab.lab.studies.why.summary import RATES, Summary

__all__ = ["figures"]

Of = Callable[[Mapping[str, Any]], float]


def _over_training(runs: Sequence[RunRecord], of: Of) -> list[tuple[int, list[float]]]:
    """For each evaluation but the first its step and the values of the runs, where all of them have one."""
    points = []
    for lines in zip(*(record.metrics for record in runs), strict=False):
        values = [of(line) for line in lines]
        if lines[0]["step"] and all(0 < value < math.inf for value in values):
            points.append((lines[0]["step"], values))
    return points


def _line(runs: Sequence[RunRecord], measure: str, dashed: bool = False) -> Line | None:
    points = _over_training(runs, partial(of_line, measure=measure))
    if not points:
        return None
    logs = [estimate([math.log(value) for value in values]) for _, values in points]
    return Line(
        [step for step, _ in points],
        [math.exp(value.mean) for value in logs],
        [math.exp(value.low) for value in logs],
        [math.exp(value.high) for value in logs],
        dashed=dashed,
    )


def _band(runs: Sequence[RunRecord]) -> Line | None:
    """Change of the gradient from the smallest to the largest step along it."""
    picks: list[Callable[[Sequence[float]], float]] = [geometric_mean, min, max]
    sides = [dict(_over_training(runs, partial(_picked, pick=pick))) for pick in picks]
    steps = sorted(set.intersection(*map(set, sides)))
    if not steps:
        return None
    middle, low, high = ([geometric_mean(side[step]) for step in steps] for side in sides)
    return Line(steps, middle, low, high)


def _picked(line: Mapping[str, Any], pick: Callable[[Sequence[float]], float]) -> float:
    changes = line["landscape"]["along"]["changes"]
    return math.nan if None in changes else pick(changes)


def _draw(name: str, lines: Mapping[str, Line | None], y_label: str, description: str) -> str:
    shown = {label: line for label, line in lines.items() if line is not None}
    middles = [value for line in shown.values() for value in line.y]
    return line_figure(
        name,
        shown,
        x_label="training steps",
        y_label=y_label,
        log_x=True,
        log_y=True,
        # The interval of a single measurement may be wide: it must not hide the lines.
        limits=(min(middles) / 4, max(middles) * 4) if middles else (None, None),
        description=description,
    )


def figures(finished: Finished, summary: Summary) -> dict[str, str]:
    """All figures of the study, by name, as SVG."""
    drawn = arm_figures(finished, ARMS, summary.scores)
    for network, title in NETWORKS.items():
        common = finished.chosen[arm_of(network, "none")]
        for rates in RATES:
            runs = {
                label: [
                    record
                    for record in finished.runs(arm_of(network, name), common if rates == "common" else None)
                    if not record.diverged
                ]
                for name, label in NORMALIZATIONS.items()
            }
            at = "each at its own best rate" if rates == "own" else "all at one rate"
            noisy = NORMALIZATIONS["noisy_batch_norm"]
            shifts = {label: _line(found, "relative_shift") for label, found in runs.items()}
            shifts[f"{noisy}, next step's noise"] = _line(runs[noisy], "relative_shift_anew", dashed=True)
            drawn[f"shift-{rates}-{network}"] = _draw(
                f"shift-{rates}-{network}",
                shifts,
                "gradient shift ‖G - G'‖ / ‖G‖",
                f"Relative gradient shift against training steps, {title}, {at}",
            )
            drawn[f"gradients-{rates}-{network}"] = _draw(
                f"gradients-{rates}-{network}",
                {label: _band(found) for label, found in runs.items()},
                "change of the gradient along itself",
                f"Range of the gradient's change along the gradient against training steps, {title}, {at}",
            )
            if rates == "own":
                drawn[f"smoothness-{rates}-{network}"] = _draw(
                    f"smoothness-{rates}-{network}",
                    {label: _line(found, "smoothness") for label, found in runs.items()},
                    "effective β-smoothness",
                    f"Effective smoothness against training steps, {title}, {at}",
                )
    return drawn
