"""What the records of the study dropout-or-bn say, as numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import StatisticsError, correlation, fmean

from batchlab.lab.comparison import Estimate, estimate, final_error, paired_difference
from batchlab.lab.records import RunRecord
from batchlab.lab.studies.arm_results import ArmResult, arm_results
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_or_bn.arms import Arm, named_arms
from batchlab.lab.studies.dropout_or_bn.settings import DropoutOrBnSettings
from batchlab.lab.studies.search import Scores

__all__ = ["Statistics", "Summary", "summarize"]


@dataclass(frozen=True)
class Statistics:
    """How the batch norms of an arm do in evaluation; means over the runs that did not diverge.

    Args:
        variance: layer -> measured shift of the variance, 1 for none.
        expected: layer -> what theory expects of it; only layers that it covers.
        mean: layer -> measured shift of the mean, in standard deviations.
        repair: test error with recalibrated statistics, less that with running averages, of the same weights.
    """

    variance: dict[str, float]
    expected: dict[str, float]
    mean: dict[str, float]
    repair: Estimate

    @property
    def worst(self) -> str:
        """The layer with the largest shift of the variance."""
        return max(self.variance, key=lambda name: self.variance[name])


@dataclass(frozen=True)
class Summary:
    """All numbers of the study.

    Args:
        images: that each run trained on.
        chosen: each arm's best rate.
        scores: of the search.
        at_edge: arms whose best rate is the smallest or the largest that was tried.
        diverged: arm -> final runs that did; their error counts as that of guessing.
        errors: test error of each arm.
        to_batch_norm: arm with both -> its error less that of batch norm alone.
        to_dropout: arm with batch norm -> its error less that of the same network and dropout without it; batch norm
            alone is compared with neither.
        instead: arm with dropout, without batch norm -> the error of batch norm alone less its own.
        to_neither: arm with dropout, without batch norm -> its error less that of neither.
        to_hidden: arm with dropout at another place -> its error less that of dropout between layers.
        to_independent: arm with batchwise dropout -> its error less that of independent dropout.
        statistics: arm with batch norm -> how that does in evaluation; only arms of which a run did not diverge.
        correlation: over the arms of the multilayer perceptron with both, of the logarithm of the largest shift with
            what recalibration changes; None if it cannot be had.
        results: arms of the multilayer perceptron against neither, for steps and seconds to an accuracy.
    """

    images: int
    chosen: dict[str, float]
    scores: Scores
    at_edge: list[str]
    diverged: dict[str, int]
    errors: dict[str, Estimate]
    to_batch_norm: dict[str, Estimate]
    to_dropout: dict[str, Estimate]
    instead: dict[str, Estimate]
    to_neither: dict[str, Estimate]
    to_hidden: dict[str, Estimate]
    to_independent: dict[str, Estimate]
    statistics: dict[str, Statistics]
    correlation: float | None
    results: dict[str, ArmResult]


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {layer: fmean(shifts[layer] for shifts in found) for layer in found[0]}


def _statistics(runs: Sequence[RunRecord]) -> Statistics | None:
    results = [record.result for record in runs if not record.diverged]
    if not results:
        return None
    scores = [result["inference"] for result in results]
    return Statistics(
        _means([result["variance_shift"] for result in results]),
        _means([result["expected_shift"] for result in results]),
        _means([result["mean_shift"] for result in results]),
        paired_difference([1 - s["running_average"] for s in scores], [1 - s["recalibrated"] for s in scores]),
    )


def _correlation(found: Sequence[Statistics]) -> float | None:
    try:
        return correlation([math.log(s.variance[s.worst]) for s in found], [s.repair.mean for s in found])
    except StatisticsError:  # fewer than two arms, or all alike
        return None


def _compare(
    arms: Mapping[str, Arm],
    errors: Mapping[str, Sequence[float]],
    chosen: Callable[[Arm], bool],
    other: Callable[[Arm], Arm],
) -> dict[str, Estimate]:
    return {
        name: paired_difference(errors[other(arm).name], errors[name])
        for name, arm in arms.items()
        if chosen(arm) and other(arm).name in arms
    }


def summarize(finished: Finished) -> Summary:
    """Compute the summary of a finished study from its records."""
    settings: DropoutOrBnSettings = finished.settings
    arms = named_arms(settings)
    runs = {name: finished.runs(name) for name in arms}
    errors = {name: [final_error(record) for record in found] for name, found in runs.items()}

    def dropped(arm: Arm) -> bool:
        return not arm.batch_norm and arm.share > 0

    instead = _compare(arms, errors, dropped, lambda arm: Arm(True, convolutional=arm.convolutional))
    measured = {name: _statistics(runs[name]) for name, arm in arms.items() if arm.batch_norm}
    statistics = {name: found for name, found in measured.items() if found is not None}
    flat = {name: rate for name, rate in finished.chosen.items() if not arms[name].convolutional}
    return Summary(
        images=min(settings.training_images or finished.training_images, finished.training_images),
        chosen=finished.chosen,
        scores=finished.scores,
        at_edge=[name for name, rate in finished.chosen.items() if rate in (min(settings.rates), max(settings.rates))],
        diverged={
            name: sum(r.diverged for r in found) for name, found in runs.items() if any(r.diverged for r in found)
        },
        errors={name: estimate(values) for name, values in errors.items()},
        to_batch_norm=_compare(arms, errors, lambda a: a.batch_norm and a.share > 0, Arm.without_dropout),
        to_dropout=_compare(arms, errors, lambda a: a.batch_norm, Arm.without_batch_norm),
        instead={name: _negative(value) for name, value in instead.items()},
        to_neither=_compare(arms, errors, dropped, Arm.without_dropout),
        to_hidden=_compare(arms, errors, lambda a: a.place != "hidden", lambda a: replace(a, place="hidden")),
        to_independent=_compare(
            arms, errors, lambda a: a.dropout == "batchwise", lambda a: replace(a, dropout="independent")
        ),
        statistics=statistics,
        correlation=_correlation(
            [found for name, found in statistics.items() if arms[name].share and not arms[name].convolutional]
        ),
        results=arm_results(replace(finished, chosen=flat), "none", [1 - error for error in settings.targets]),
    )


def _negative(value: Estimate) -> Estimate:
    return Estimate(-value.mean, -value.high, -value.low, value.n)
