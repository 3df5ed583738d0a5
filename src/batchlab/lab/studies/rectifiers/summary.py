"""What the records of the study rectifiers say, as numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from batchlab.lab.comparison import Estimate, estimate, final_error, paired_difference, paired_ratio, steps_to_target
from batchlab.lab.records import RunRecord
from batchlab.lab.studies.arm_results import CHANCE
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.rectifiers.settings import STARTS, RectifiersSettings, cell
from batchlab.lab.studies.search import Scores

__all__ = ["CellResult", "Summary", "count_trained", "fewer_steps", "gain", "summarize", "trains"]


@dataclass(frozen=True)
class CellResult:
    """How one network learned.

    Args:
        accuracies: of each seed, on the test images, mean over the evaluations of the last tenth of the steps;
            guessing for a run that diverged.
        accuracy: their mean.
        trained: how many runs end at `trains_from` or above.
        diverged: how many runs diverged.
        steps: of each seed to the target, None where it was never reached.
        sizes: of each hidden layer before the first step, the mean square of what enters its nonlinearity, divided by
            the first layer's; geometric mean over seeds.
        differing: of each hidden layer, the share of that mean square which differs between images; likewise.
        gradients: of each hidden layer, the mean square of the loss's gradient there, divided by the last layer's;
            likewise.
        slopes: of each seed that did not diverge, each layer's learned slope; empty but for PReLU.
    """

    accuracies: tuple[float, ...]
    accuracy: Estimate
    trained: int
    diverged: int
    steps: tuple[int | None, ...]
    sizes: tuple[float, ...]
    differing: tuple[float, ...]
    gradients: tuple[float, ...]
    slopes: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Summary:
    """All numbers of the study.

    Args:
        chosen: each network's best rate.
        scores: of the search.
        cells: each network's results.
        not_closed: networks that train, and whose best rate is the smallest or the largest tried.
        seconds: of the processor's time that all runs took to train, those of the search included.
    """

    chosen: dict[str, float]
    scores: Scores
    cells: dict[str, CellResult]
    not_closed: tuple[str, ...]
    seconds: float


def _typical(runs: Sequence[RunRecord], value: Callable[[dict[str, list[float]]], list[float]]) -> tuple[float, ...]:
    """The geometric mean over runs of each layer's value; 0 where the numbers were too small to be told from it."""
    layers = zip(*(value(record.result["signal"]) for record in runs), strict=True)
    return tuple(math.exp(fmean(map(math.log, layer))) if min(layer) > 0 else 0.0 for layer in layers)


def _cell(settings: RectifiersSettings, runs: Sequence[RunRecord]) -> CellResult:
    accuracies = tuple(1 - final_error(record, diverged=1 - CHANCE) for record in runs)

    def share(signal: dict[str, list[float]]) -> list[float]:
        return [d / s if s else 0.0 for d, s in zip(signal["differing"], signal["size"], strict=True)]

    return CellResult(
        accuracies=accuracies,
        accuracy=estimate(accuracies),
        trained=sum(value >= settings.trains_from for value in accuracies),
        diverged=sum(record.diverged for record in runs),
        steps=tuple(steps_to_target(record, settings.target) for record in runs),
        sizes=_typical(runs, lambda signal: [size / signal["size"][0] for size in signal["size"]]),
        differing=_typical(runs, share),
        gradients=_typical(runs, lambda signal: [g / (signal["gradient"][-1] or 1.0) for g in signal["gradient"]]),
        slopes=tuple(tuple(record.result["slopes"].values()) for record in runs if "slopes" in record.result),
    )


def summarize(finished: Finished) -> Summary:
    """Compute the summary of a finished study from its records."""
    settings: RectifiersSettings = finished.settings
    cells = {name: _cell(settings, finished.runs(name)) for name in settings.cells}
    ends = (min(settings.rates), max(settings.rates))
    return Summary(
        chosen=finished.chosen,
        scores=finished.scores,
        cells=cells,
        not_closed=tuple(n for n in cells if trains(cells[n]) and finished.chosen[n] in ends and len(set(ends)) == 2),
        seconds=round(sum(record.timing.get("processor_seconds", 0.0) for record in finished.records.values()), 3),
    )


def trains(result: CellResult) -> bool:
    """Whether every run of the network ends trained."""
    return result.trained == len(result.accuracies)


def gain(summary: Summary, other: str, baseline: str) -> Estimate:
    """Test accuracy of `other` less that of `baseline`, seed by seed."""
    return paired_difference(summary.cells[baseline].accuracies, summary.cells[other].accuracies)


def fewer_steps(summary: Summary, other: str, baseline: str) -> Estimate | None:
    """How many times fewer steps `other` needs to the target; None unless every run of both gets there."""
    own, base = summary.cells[other].steps, summary.cells[baseline].steps
    pairs = [(a, b) for a, b in zip(base, own, strict=True) if a and b]
    return paired_ratio([a for a, _ in pairs], [b for _, b in pairs]) if len(pairs) == len(base) else None


def count_trained(settings: RectifiersSettings, summary: Summary, normalization: str) -> tuple[int, int]:
    """How many of the networks with this normalization train, and how many there are."""
    results = [summary.cells[cell(start, depth, normalization)] for start in STARTS for depth in settings.depths]
    return sum(map(trains, results)), len(results)
