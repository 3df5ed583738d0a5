"""What the records of the study learning-rates say, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final

from batchlab.lab.comparison import Estimate, paired_difference
from batchlab.lab.studies.arm_results import CHANCE, ArmResult, arm_results
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.learning_rates.settings import BASELINE, LearningRatesSettings, arm
from batchlab.lab.studies.search import Scores, run_name

__all__ = ["GOALS", "Condition", "Limits", "Summary", "Times", "compare_limits", "limits", "summarize"]

GOALS: Final = (0.5, 0.7, 0.8)
"""Lower accuracies that a run could have to reach: do the limits depend on the one that was chosen?"""


@dataclass(frozen=True)
class Limits:
    """Between which rates an arm trains: the widest unbroken row of rates at which every seed does.

    Args:
        lowest: the smallest of them; None: every seed trains at no rate.
        highest: the largest of them.
        open_below: it is the smallest rate tried.
        open_above: it is the largest rate tried.
    """

    lowest: float | None
    highest: float | None
    open_below: bool = False
    open_above: bool = False

    @property
    def decades(self) -> float | None:
        """Width of the range in powers of ten."""
        return None if self.lowest is None or self.highest is None else math.log10(self.highest / self.lowest)


@dataclass(frozen=True)
class Times:
    """How many times as large one arm's limit is as another's.

    Args:
        factor: of the limits at which every seed trains.
        low: smallest factor that the seeds and the distance between two rates allow.
        high: largest; None: without bound, because the search ends below a limit.
    """

    factor: float
    low: float
    high: float | None

    @property
    def larger(self) -> bool:
        """Every seed of the one trains where none of the other does."""
        return self.low >= 1

    @property
    def smaller(self) -> bool:
        """Every seed of the other trains where none of the one does."""
        return self.high is not None and self.high <= 1


@dataclass(frozen=True)
class Condition:
    """All arms with one nonlinearity.

    Args:
        scores: arm -> rate -> accuracy on held-out images at the end for each seed, a guesser's where it diverged.
        chosen: each arm's best rate.
        limits: between which rates each arm trains.
        largest: arm -> its largest rate against the baseline's; an arm that has none, or whose baseline has none, is
            left out.
        smallest: the same for the smallest rates.
        than_batch_norm: arm -> its largest rate against batch norm's.
        at_goals: accuracy with which a run would count as trained -> batch norm's largest rate against the baseline's.
        growth: arm -> rate -> how many times the hidden weights grew, the geometric mean over layers and over the seeds
            that did not diverge; rates at which all did are left out.
        at_baseline: arm -> paired difference of its accuracy to the baseline's, both at the baseline's best rate.
        results: final runs at each arm's best rate, against the baseline, on test images.
    """

    scores: Scores
    chosen: dict[str, float]
    limits: dict[str, Limits]
    largest: dict[str, Times]
    smallest: dict[str, Times]
    than_batch_norm: dict[str, Times]
    at_goals: dict[float, Times]
    growth: dict[str, dict[float, float]]
    at_baseline: dict[str, Estimate]
    results: dict[str, ArmResult]


def limits(trained: Mapping[float, bool]) -> Limits:
    """The widest unbroken row of rates that train; of equally wide ones the one of larger rates.

    >>> limits({0.1: True, 0.3: False, 1.0: True, 3.0: True, 10.0: False})
    Limits(lowest=1.0, highest=3.0, open_below=False, open_above=False)
    """
    rates = sorted(trained)
    best: list[float] = []
    row: list[float] = []
    for rate in rates:
        row = [*row, rate] if trained[rate] else []
        if row and (not best or row[-1] / row[0] >= best[-1] / best[0]):
            best = row
    if not best:
        return Limits(None, None)
    return Limits(best[0], best[-1], best[0] == rates[0], best[-1] == rates[-1])


def _every(scores: Mapping[float, Sequence[float]], goal: float) -> Limits:
    return limits({rate: min(values) >= goal for rate, values in scores.items()})


def _seeds(scores: Mapping[float, Sequence[float]], goal: float) -> list[Limits]:
    count = len(next(iter(scores.values())))
    return [limits({rate: values[seed] >= goal for rate, values in scores.items()}) for seed in range(count)]


def compare_limits(
    baseline: Mapping[float, Sequence[float]],
    other: Mapping[float, Sequence[float]],
    goal: float,
    *,
    upper: bool,
) -> Times | None:
    """How many times as large the other's upper (or lower) limit is, over all pairs of seeds; None if one has none.

    A limit lies between the last rate that trains and its neighbour that does not, so with t the one and f the other
    it is from t / f of the two arms to f / t.

    Args:
        baseline: rate -> accuracy of each seed.
        other: the same.
        goal: accuracy with which a run counts as trained.
        upper: compare the largest rates, not the smallest.
    """
    pair = _every(baseline, goal), _every(other, goal)
    ends = [found.highest if upper else found.lowest for found in pair]
    rates = sorted(baseline)
    spans: list[tuple[float, float]] = []
    for scores in (baseline, other):
        spans_of_seeds = []
        for found in _seeds(scores, goal):
            end = found.highest if upper else found.lowest
            if end is None:
                return None
            place = rates.index(end) + (1 if upper else -1)
            beyond = rates[place] if 0 <= place < len(rates) else (math.inf if upper else 0.0)
            spans_of_seeds.append((min(end, beyond), max(end, beyond)))
        spans.append((min(low for low, _ in spans_of_seeds), max(high for _, high in spans_of_seeds)))
    if ends[0] is None or ends[1] is None:
        return None
    (low, high), (other_low, other_high) = spans
    largest = other_high / low if low and math.isfinite(other_high) else None
    return Times(ends[1] / ends[0], other_low / high, largest)


def _growth(finished: Finished, name: str, rate: float) -> float | None:
    settings: LearningRatesSettings = finished.settings
    logs: list[float] = []
    for seed in settings.seeds_of_search:
        record = finished.records[run_name("search", name, rate, seed)]
        hidden = [value for layer, value in record.result.get("weight_growth", {}).items() if layer != "output"]
        if not record.diverged and hidden:
            logs.append(fmean(math.log(value) for value in hidden))
    return math.exp(fmean(logs)) if logs else None


def _condition(finished: Finished, activation: str) -> Condition:
    settings: LearningRatesSettings = finished.settings
    names = settings.arms(activation)
    first = arm(activation, BASELINE)
    scores = {
        name: {rate: [score or CHANCE for score in values] for rate, values in finished.scores[name].items()}
        for name in names
    }
    chosen = {name: finished.chosen[name] for name in names}
    own = chosen[first]
    batch_norm = arm(activation, "batch_norm")
    goals = {
        goal: compare_limits(scores[first], scores[batch_norm], goal, upper=True)
        for goal in (*(goal for goal in GOALS if goal < settings.goal), settings.goal)
    }

    def against(base: str, upper: bool) -> dict[str, Times]:
        found = {name: compare_limits(scores[base], scores[name], settings.goal, upper=upper) for name in names}
        return {name: ratio for name, ratio in found.items() if ratio is not None and name != base}

    growth = {name: {rate: _growth(finished, name, rate) for rate in scores[name]} for name in names}
    return Condition(
        scores,
        chosen,
        {name: _every(scores[name], settings.goal) for name in names},
        against(first, True),
        against(first, False),
        against(batch_norm, True),
        {goal: ratio for goal, ratio in goals.items() if ratio is not None},
        {name: {rate: value for rate, value in row.items() if value is not None} for name, row in growth.items()},
        {name: paired_difference(scores[first][own], scores[name][own]) for name in names if name != first},
        arm_results(replace(finished, chosen=chosen), first, ()),
    )


@dataclass(frozen=True)
class Summary:
    """All numbers of the study: nonlinearity -> its comparison."""

    conditions: dict[str, Condition]


def summarize(finished: Finished) -> Summary:
    """Compute the summary of a finished study from its records."""
    settings: LearningRatesSettings = finished.settings
    return Summary({activation: _condition(finished, activation) for activation in settings.activations})
