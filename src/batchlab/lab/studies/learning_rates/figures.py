"""The figures of the study learning-rates."""

from __future__ import annotations

from statistics import fmean
from typing import Final

from batchlab.lab.figures import Line, line_figure, range_bars
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.learning_rates.settings import ACTIVATIONS, SCALE_FREE, LearningRatesSettings, label
from batchlab.lab.studies.learning_rates.summary import Condition, Summary

__all__ = ["figures"]

DRAWN: Final = ("none", "mean_only", "batch_norm", "weight_norm", "centered", "standardization")
"""Mechanisms whose accuracy is drawn; the bars and tables have all."""


def _drawn(condition: Condition) -> list[str]:
    return [name for name in condition.scores if name.split("_", 1)[1] in DRAWN]


def _accuracy(settings: LearningRatesSettings, activation: str, condition: Condition) -> str:
    rates = sorted(settings.rates)
    lines = {}
    for name in _drawn(condition):
        scores = [condition.scores[name][rate] for rate in rates]
        several = settings.search_seeds > 1
        lines[label(name)] = Line(
            rates,
            [fmean(values) for values in scores],
            [min(values) for values in scores] if several else (),
            [max(values) for values in scores] if several else (),
        )
    return line_figure(
        f"{activation}-accuracy",
        lines,
        x_label="learning rate",
        y_label="held-out accuracy",
        log_x=True,
        percent=True,
        limits=(0, 1),
        levels={"": settings.goal},
        description=f"Held-out accuracy against learning rate, {ACTIVATIONS[activation][0]} units: {', '.join(lines)}",
    )


def _ranges(settings: LearningRatesSettings, activation: str, condition: Condition) -> str:
    bars: dict[str, tuple[float, float] | None] = {}
    for name, found in condition.limits.items():
        ends = found.lowest, found.highest
        bars[label(name)] = None if ends[0] is None or ends[1] is None else (ends[0], ends[1])
    rates = sorted(settings.rates)
    return range_bars(
        f"{activation}-ranges",
        bars,
        {label(name): rate for name, rate in condition.chosen.items()},
        limits=(rates[0] / 1.8, rates[-1] * 1.8),
        x_label="learning rate",
        groups={label(name): int(name.split("_", 1)[1] in SCALE_FREE) for name in condition.limits},
        description=f"Range of learning rates that train, {ACTIVATIONS[activation][0]} units, for each mechanism",
    )


def _growth(activation: str, condition: Condition) -> str:
    lines = {}
    for name in _drawn(condition):
        top = condition.limits[name].highest
        points = {rate: value for rate, value in condition.growth[name].items() if top is not None and rate <= top}
        if points:
            lines[label(name)] = Line(list(points), list(points.values()))
    return line_figure(
        f"{activation}-growth",
        lines,
        x_label="learning rate",
        y_label="length at the end / at the start",
        log_x=True,
        log_y=True,
        description=f"Growth of the hidden weights against learning rate, {ACTIVATIONS[activation][0]} units",
    )


def figures(finished: Finished, summary: Summary) -> dict[str, str]:
    """Name -> SVG: accuracy and range of each nonlinearity, growth of the weights of the first."""
    settings: LearningRatesSettings = finished.settings
    drawn = {}
    for activation, condition in summary.conditions.items():
        drawn[f"{activation}-accuracy"] = _accuracy(settings, activation, condition)
        drawn[f"{activation}-ranges"] = _ranges(settings, activation, condition)
    first = settings.activations[0]
    drawn[f"{first}-growth"] = _growth(first, summary.conditions[first])
    return drawn
