"""What the records of the study why say, as numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from batchlab.lab.comparison import Estimate, paired_ratio
from batchlab.lab.records import RunRecord
from batchlab.lab.studies.arm_results import ArmResult, arm_results
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.search import Scores
from batchlab.lab.studies.why.measures import (
    MEASURES,
    WINDOWS,
    geometric_mean,
    layer_shifts,
    of_run,
    window,
)
from batchlab.lab.studies.why.settings import NETWORKS, NORMALIZATIONS, WhySettings, arm_of

__all__ = ["RATES", "Measured", "Summary", "further_pairs", "summarize"]

RATES = ("own", "common")
"""Each arm at its own best rate; all at the best rate of the network without normalization."""


@dataclass(frozen=True)
class Measured:
    """A measure of an arm in a window.

    Args:
        mean: geometric mean over the runs that have it.
        ratio: to no normalization, paired by seed; None for that arm itself, and where no pair of runs has both.
    """

    mean: float
    ratio: Estimate | None


Part = dict[str, dict[str, Measured]]
"""Normalization -> measure -> what was measured; measures that no run has are left out."""


@dataclass(frozen=True)
class Summary:
    """All numbers of the study.

    Args:
        chosen: each arm's best rate.
        scores: of the search.
        results: network -> arm -> how it learned, against no normalization.
        targets: network -> the hardest accuracy that every run of it reached; None if there is none.
        parts: network -> rates ("own" or "common") -> window -> what was measured.
        layers: network -> normalization -> ratio of the relative gradient shift of each layer but the first, at own
            rates and the same loss; None where it cannot be told.
    """

    chosen: dict[str, float]
    scores: Scores
    results: dict[str, dict[str, ArmResult]]
    targets: dict[str, float | None]
    parts: dict[str, dict[str, dict[str, Part]]]
    layers: dict[str, dict[str, list[Estimate | None]]]


def further_pairs(chosen: Mapping[str, float]) -> list[tuple[str, float]]:
    """Every arm at the best rate of its network without normalization, where that is not its own."""
    pairs = []
    for network in NETWORKS:
        common = chosen[arm_of(network, "none")]
        arms = [arm_of(network, normalization) for normalization in NORMALIZATIONS]
        pairs += [(arm, common) for arm in arms if chosen[arm] != common]
    return pairs


def _ratio(baseline: Sequence[float], other: Sequence[float]) -> Estimate | None:
    pairs = [(a, b) for a, b in zip(baseline, other, strict=True) if not math.isnan(a + b)]
    return paired_ratio([b for _, b in pairs], [a for a, _ in pairs]) if pairs else None


def _each_run(runs: Sequence[RunRecord], measure: Callable[[RunRecord], float]) -> list[float]:
    return [math.nan if record.diverged else measure(record) for record in runs]


Choice = Callable[[RunRecord], list[dict[str, Any]]]
"""The evaluations of a run that count."""


def _measure(record: RunRecord, lines: Choice, measure: str) -> float:
    return of_run(lines(record), measure)


def _part(runs: Mapping[str, Sequence[RunRecord]], lines: Choice) -> Part:
    part: Part = {normalization: {} for normalization in runs}
    for measure in MEASURES:
        values = {
            name: _each_run(records, partial(_measure, lines=lines, measure=measure)) for name, records in runs.items()
        }
        for name, found in values.items():
            mean = geometric_mean([value for value in found if not math.isnan(value)])
            if not math.isnan(mean):
                ratio = None if name == "none" else _ratio(values["none"], found)
                part[name][measure] = Measured(mean, ratio)
    return part


def _layers(runs: Mapping[str, Sequence[RunRecord]], lines: Choice, count: int) -> dict[str, list[Estimate | None]]:
    def shift(record: RunRecord, layer: int) -> float:
        values = [layer_shifts(line)[layer] for line in lines(record)]
        return geometric_mean([value for value in values if 0 < value < math.inf])

    def values(name: str, layer: int) -> list[float]:
        return _each_run(runs[name], lambda record: shift(record, layer))

    return {
        name: [_ratio(values("none", layer), values(name, layer)) for layer in range(count)]
        for name in runs
        if name != "none"
    }


def _target(results: Mapping[str, ArmResult], targets: Sequence[float]) -> float | None:
    rows = [result.steps for result in results.values()]
    reached = [target for target, row in zip(targets, zip(*rows, strict=True), strict=True) if _all_got_there(row)]
    return max(reached, default=None)


def _all_got_there(row: Sequence[Any]) -> bool:
    return all(None not in steps.other for steps in row)


def summarize(finished: Finished) -> Summary:
    """Compute the summary of a finished study from its records."""
    settings: WhySettings = finished.settings
    results, targets, parts, layers = {}, {}, {}, {}
    for network in NETWORKS:
        arms = {normalization: arm_of(network, normalization) for normalization in NORMALIZATIONS}
        own = replace(finished, chosen={arm: finished.chosen[arm] for arm in arms.values()})
        results[network] = arm_results(own, arms["none"], settings.targets)
        targets[network] = _target(results[network], settings.targets)
        common = finished.chosen[arms["none"]]
        runs = {
            "own": {name: finished.runs(arm) for name, arm in arms.items()},
            "common": {name: finished.runs(arm, common) for name, arm in arms.items()},
        }
        parts[network] = {
            rates: {name: _part(found, partial(window, name=name, losses=settings.losses)) for name in WINDOWS}
            for rates, found in runs.items()
        }
        count = len(settings.widths if network == "sigmoid" else settings.relu_widths)
        layers[network] = _layers(runs["own"], partial(window, name="same loss", losses=settings.losses), count)
    return Summary(finished.chosen, finished.scores, results, targets, parts, layers)
