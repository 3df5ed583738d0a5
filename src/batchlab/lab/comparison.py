"""Honest comparisons: means with intervals over seeds, and ratios of runs that share a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

from batchlab.lab.records import RunRecord

__all__ = [
    "Curve",
    "Estimate",
    "StepsToTarget",
    "compare_steps",
    "estimate",
    "final_error",
    "final_score",
    "mean_curve",
    "paired_difference",
    "paired_ratio",
    "paired_share",
    "steps_to_target",
    "student_t_quantile",
]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds and the 95 % interval for the true mean (Student's t; no interval for one seed)."""

    mean: float
    low: float
    high: float
    n: int


@cache
def student_t_quantile(degrees: int, probability: float = 0.975) -> float:
    """The `probability` quantile of Student's t distribution, found by bisection on its integral.

    >>> round(student_t_quantile(4), 3)
    2.776
    """
    if degrees < 1 or not 0.5 <= probability < 1:
        raise ValueError(f"degrees={degrees}, probability={probability}: needs degrees >= 1 and 0.5 <= probability < 1")
    # With t = √ν tan φ the density becomes cos^(ν-1) φ, smooth on a bounded interval: Simpson's rule is exact enough.
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def below(angle: float, pieces: int = 400) -> float:
        width = angle / pieces
        heights = [math.cos(index * width) ** (degrees - 1) for index in range(pieces + 1)]
        total = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
        return 0.5 + scale * total * width / 3

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of values that are independent (one a seed).

    >>> estimate([1.0, 2.0, 3.0])
    Estimate(mean=2.0, low=-0.484..., high=4.484..., n=3)
    """
    if not values:
        raise ValueError("no values to take a mean of")
    mean, n = fmean(values), len(values)
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    reach = student_t_quantile(n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - reach, mean + reach, n)


def paired_difference(baseline: Sequence[float], other: Sequence[float]) -> Estimate:
    """Mean and interval of other - baseline, pair by pair (the same seed at the same place)."""
    return estimate([b - a for a, b in zip(baseline, other, strict=True)])


def paired_ratio(baseline: Sequence[float], other: Sequence[float]) -> Estimate:
    """Geometric mean and interval of baseline / other, pair by pair: how many times less `other` needs.

    >>> paired_ratio([200.0, 800.0], [100.0, 100.0]).mean
    4.0
    """
    logs = estimate([math.log2(a / b) for a, b in zip(baseline, other, strict=True)])
    return Estimate(2**logs.mean, 2**logs.low, 2**logs.high, logs.n)


def paired_share(parts: Sequence[float], wholes: Sequence[float]) -> Estimate | None:
    """mean(parts) / mean(wholes) of values paired by seed, with Fieller's 95 % interval for this ratio of means.

    The interval holds the shares s for which the mean of part - s · whole is not clearly different from 0. None if the
    mean of the wholes is not clearly above 0: then the interval is not bounded, and nothing has a share.

    >>> share = paired_share([1.0, 1.2, 1.1], [2.0, 2.2, 2.4])
    >>> round(share.mean, 3), round(share.low, 3), round(share.high, 3)
    (0.5, 0.397, 0.63)
    """
    part, whole = estimate(parts), estimate(wholes)
    if part.n != whole.n:
        raise ValueError(f"{part.n} parts and {whole.n} wholes: they must be pairs")
    if whole.mean <= 0 or whole.low <= 0:
        return None
    if part.n == 1:
        return Estimate(part.mean / whole.mean, math.nan, math.nan, 1)
    scale = student_t_quantile(part.n - 1) ** 2 / (part.n * (part.n - 1))

    def spread(left: Sequence[float], right: Sequence[float]) -> float:
        middle = fmean(left), fmean(right)
        return scale * sum((a - middle[0]) * (b - middle[1]) for a, b in zip(left, right, strict=True))

    # (part - s whole)² = t² var(part - s whole) / n is a quadratic equation in s.
    square = whole.mean**2 - spread(wholes, wholes)
    middle = (part.mean * whole.mean - spread(parts, wholes)) / square
    reach = math.sqrt(max(0.0, middle**2 - (part.mean**2 - spread(parts, parts)) / square))
    return Estimate(part.mean / whole.mean, middle - reach, middle + reach, part.n)


def steps_to_target(record: RunRecord, target: float) -> int | None:
    """The steps at the first evaluation with at least the target accuracy; None if there is none."""
    steps, accuracies = record.curve
    return next((step for step, accuracy in zip(steps, accuracies, strict=True) if accuracy >= target), None)


def final_score(record: RunRecord, share: float = 0.2) -> float:
    """Mean accuracy over the evaluations of the last `share` of the steps; 0 for a run that diverged.

    At a constant learning rate the last evaluation alone is noisy; this is what rates are chosen by.
    """
    if record.diverged:
        return 0.0
    steps, accuracies = record.curve
    return fmean(a for step, a in zip(steps, accuracies, strict=True) if step >= (1 - share) * record.settings.steps)


def final_error(record: RunRecord, share: float = 0.1, diverged: float = 0.9) -> float:
    """Mean error over the evaluations of the last `share` of the steps; `diverged` (guessing) if the run did.

    For falling learning rates, where the end is quiet; a single evaluation is still noisy.
    """
    return diverged if record.diverged else 1 - final_score(record, share)


@dataclass(frozen=True)
class StepsToTarget:
    """How two arms reach a target.

    Args:
        target: accuracy; None if each seed's baseline sets its own.
        baseline: steps of each seed's baseline run, None where it never got there.
        other: the same for the other arm.
        ratio: baseline / other over the seeds where both got there; None if there are none.
    """

    target: float | None
    baseline: tuple[int | None, ...]
    other: tuple[int | None, ...]
    ratio: Estimate | None


def _paired(baseline: Sequence[RunRecord], other: Sequence[RunRecord]) -> list[tuple[RunRecord, RunRecord]]:
    by_seed = {record.settings.seed: record for record in other}
    seeds = [record.settings.seed for record in baseline]
    if len(by_seed) != len(other) or sorted(seeds) != sorted(by_seed):
        raise ValueError(f"arms must have the same seeds once each, not {sorted(seeds)} and {sorted(by_seed)}")
    return [(record, by_seed[record.settings.seed]) for record in baseline]


def compare_steps(
    baseline: Sequence[RunRecord], other: Sequence[RunRecord], target: float | None = None
) -> StepsToTarget:
    """Steps to a target accuracy in two arms, paired by seed; `target` None: the best of each seed's baseline run."""
    pairs = _paired(baseline, other)
    goals = [max(first.curve[1]) if target is None else target for first, _ in pairs]
    left = tuple(steps_to_target(first, goal) for (first, _), goal in zip(pairs, goals, strict=True))
    right = tuple(steps_to_target(second, goal) for (_, second), goal in zip(pairs, goals, strict=True))
    both = [(a, b) for a, b in zip(left, right, strict=True) if a and b]
    ratio = paired_ratio([a for a, _ in both], [b for _, b in both]) if both else None
    return StepsToTarget(target, left, right, ratio)


@dataclass(frozen=True)
class Curve:
    """Mean accuracy over seeds at each evaluation, with its interval (NaN for one seed)."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def mean_curve(records: Sequence[RunRecord]) -> Curve:
    """Average the accuracy curves of one arm's seeds, over the evaluations that all of them reached."""
    length = min(len(record.metrics) for record in records)
    steps = tuple(records[0].curve[0][:length])
    points = [estimate([record.curve[1][index] for record in records]) for index in range(length)]
    return Curve(steps, tuple(p.mean for p in points), tuple(p.low for p in points), tuple(p.high for p in points))
