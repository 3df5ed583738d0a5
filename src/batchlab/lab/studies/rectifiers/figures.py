"""The figures of the study rectifiers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchlab.lab.comparison import estimate
from batchlab.lab.figures import Cell, Line, line_figure, rate_search, table_figure
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.rectifiers.settings import NORMALIZATIONS, STARTS, RectifiersSettings, cell
from batchlab.lab.studies.rectifiers.summary import CellResult, Summary, trains

__all__ = ["figures"]

TRAINED, FAILED = 1, 0  # of the figures' colours: blue and orange
FLOOR = 1e-12


def _shade(accuracy: float) -> float:
    """Darker the fewer errors: a tenth of them is as much darker wherever it is."""
    return min(1.0, -math.log10(max(1 - accuracy, 1e-3)) / 2)


def _field(result: CellResult) -> Cell:
    text = f"{100 * result.accuracy.mean:.1f}"
    if trains(result):
        return Cell(text, TRAINED, _shade(result.accuracy.mean))
    # Runs that trained among others that did not: their number says more than a mean of the two kinds.
    return Cell(f"{result.trained} of {len(result.accuracies)}" if result.trained else text, FAILED, 0.35)


def _grid(settings: RectifiersSettings, summary: Summary) -> str:
    panels = {
        words: [[_field(summary.cells[cell(start, depth, norm)]) for depth in settings.depths] for start in STARTS]
        for norm, words in NORMALIZATIONS.items()
    }
    return table_figure(
        "cells",
        panels,
        [start.label for start in STARTS.values()],
        [str(depth) for depth in settings.depths],
        x_label="hidden layers",
        description="Test accuracy in per cent of every network, by nonlinearity, first weights, depth and batch norm",
    )


def _ticks(settings: RectifiersSettings) -> list[int]:
    return [1, *range(5, settings.depths[-1] + 1, 5)]


def _through_layers(
    name: str, settings: RectifiersSettings, lines: dict[str, Sequence[float]], dashed: str, y_label: str
) -> str:
    layers = range(1, settings.depths[-1] + 1)
    shown = {
        key: Line(layers, [max(value, FLOOR) for value in values], dashed=key == dashed)
        for key, values in lines.items()
    }
    return line_figure(
        name,
        shown,
        x_label="hidden layer",
        y_label=y_label,
        x_ticks=_ticks(settings),
        log_y=True,
        limits=(0.5 * min(min(line.y) for line in shown.values()), None),
        description=f"{y_label} against the layer, before the first step, for {', '.join(lines)}",
    )


def _starts(settings: RectifiersSettings, summary: Summary) -> dict[str, str]:
    deepest = settings.depths[-1]
    plain = {start.label: summary.cells[cell(name, deepest)] for name, start in STARTS.items()}
    normalized = {
        f"{STARTS[name].label.replace(' start', '')}, batch norm": summary.cells[cell(name, deepest, "batch_norm")]
        for name in ("sigmoid", "relu_he", "prelu_he")
    }
    theory = "in theory: ½ a layer"
    sizes: dict[str, Sequence[float]] = {key: found.sizes for key, found in plain.items()}
    sizes[theory] = [0.5**layer for layer in range(deepest)]
    shares: dict[str, Sequence[float]] = {key: found.differing for key, found in plain.items()}
    shares |= {key: found.differing for key, found in list(normalized.items())[1:2]}
    gradients: dict[str, Sequence[float]] = {key: found.gradients for key, found in (plain | normalized).items()}
    return {
        "start-size": _through_layers("start-size", settings, sizes, theory, "mean square, first layer = 1"),
        "start-signal": _through_layers("start-signal", settings, shares, "", "share that differs between images"),
        "start-gradient": _through_layers(
            "start-gradient", settings, gradients, "", "mean square of the gradient, last = 1"
        ),
    }


def _slopes(settings: RectifiersSettings, summary: Summary) -> str:
    deepest = settings.depths[-1]
    lines = {}
    for norm, behind in (("none", ""), ("batch_norm", ", batch norm")):
        for name in ("prelu_xavier", "prelu_he"):
            runs = summary.cells[cell(name, deepest, norm)].slopes
            if runs:
                points = [estimate(layer) for layer in zip(*runs, strict=True)]
                lines[STARTS[name].label.partition(", ")[2] + behind] = Line(
                    range(1, deepest + 1), [p.mean for p in points], [p.low for p in points], [p.high for p in points]
                )
    means = [value for line in lines.values() for value in line.y]
    lowest, highest = min(means), max(means)
    return line_figure(
        "slopes",
        lines,
        x_label="hidden layer",
        y_label="learned slope",
        x_ticks=_ticks(settings),
        # Bands of few seeds can be far wider than the lines are apart.
        limits=(min(0.0, 1.25 * lowest), max(0.5, 1.25 * highest)),
        levels={"at the start": 0.25},
        description="Learned slope of each layer's PReLU for " + ", ".join(lines),
    )


def figures(finished: Finished, summary: Summary) -> dict[str, str]:
    """All figures of the study, by name, as SVG."""
    settings: RectifiersSettings = finished.settings
    drawn = {"cells": _grid(settings, summary), **_starts(settings, summary)}
    deepest = settings.depths[-1]
    if any(summary.cells[cell(name, deepest, norm)].slopes for name in STARTS for norm in NORMALIZATIONS):
        drawn["slopes"] = _slopes(settings, summary)
    for norm, words in NORMALIZATIONS.items():
        names = {cell(name, deepest, norm): start.label for name, start in STARTS.items()}
        drawn[f"rate-search-{norm}"] = rate_search(
            f"rate-search-{norm}",
            {text: summary.scores[name] for name, text in names.items()},
            {text: summary.chosen[name] for name, text in names.items()},
            description=f"Validation accuracy against learning rate with {deepest} hidden layers, {words}",
        )
    return drawn
