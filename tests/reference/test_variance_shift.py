"""The variance-shift formula against simulated sums of noisy, correlated inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from batchlab.reference.variance_shift import dropout_second_moment, uniform_second_moment, variance_shift_ratio

SAMPLES = 40_000


def inputs(
    rng: np.random.Generator, count: int, mean: float, variance: float, correlation: float, samples: int = SAMPLES
) -> np.ndarray:
    """Normal variables that share a part: pairwise correlation is the part's share of the variance."""
    common = rng.standard_normal((samples, 1)) * math.sqrt(correlation)
    own = rng.standard_normal((samples, count)) * math.sqrt(1 - correlation)
    return mean + math.sqrt(variance) * (common + own)


FIELDS = ("weights", "mean", "variance", "correlation")
CASES = {
    "one-input": ([1.0], 0.0, 1.0, 0.0),
    "one-input-with-mean": ([2.0], 1.5, 0.5, 0.0),
    "equal-weights": ([0.5] * 10, 1.0, 2.0, 0.0),
    "correlated": ([0.5] * 10, 1.0, 2.0, 0.3),
    "signs": ([1.0, -2.0, 0.5, -0.5, 1.5], 0.7, 1.0, 0.5),
}


def noise(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> tuple[np.ndarray, float]:
    if kind == "dropout":
        return (rng.random(shape) >= 0.4) / 0.6, dropout_second_moment(0.4)
    if kind == "gaussian":
        return 1 + math.sqrt(0.4 / 0.6) * rng.standard_normal(shape), dropout_second_moment(0.4)
    return 1 + 0.8 * (2 * rng.random(shape) - 1), uniform_second_moment(0.8)


@pytest.mark.parametrize("kind", ["dropout", "gaussian", "uniform"])
@pytest.mark.parametrize(FIELDS, CASES.values(), ids=CASES.keys())
def test_independent_noise(kind: str, weights: list[float], mean: float, variance: float, correlation: float) -> None:
    rng = np.random.default_rng(0)
    w = np.array(weights)
    x = inputs(rng, len(w), mean, variance, correlation)
    n, second_moment = noise(rng, kind, x.shape)
    simulated = (x @ w).var() / ((x * n) @ w).var()
    alignment = w.sum() ** 2 / (w**2).sum()
    expected = variance_shift_ratio(mean, variance, second_moment, correlation=correlation, alignment=alignment)
    # Each variance of 40,000 samples is off by about sqrt(2..6 / 40,000) = 1%, less for a pair on the same x.
    assert simulated == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(FIELDS, CASES.values(), ids=CASES.keys())
def test_batchwise_noise(weights: list[float], mean: float, variance: float, correlation: float) -> None:
    rng = np.random.default_rng(1)
    w = np.array(weights)
    patterns, batch = 3000, 100
    x = inputs(rng, len(w), mean, variance, correlation, patterns * batch).reshape(patterns, batch, len(w))
    n, second_moment = noise(rng, "dropout", (patterns, 1, len(w)))
    within = ((x * n) @ w).var(axis=1, ddof=1).mean()
    simulated = (x @ w).var(axis=1, ddof=1).mean() / within
    alignment = w.sum() ** 2 / (w**2).sum()
    options = {"correlation": correlation, "alignment": alignment}
    expected = variance_shift_ratio(mean, variance, second_moment, batchwise=True, **options)
    # The variance in a batch varies from pattern to pattern, by up to its own size for one input: 1/sqrt(3000) = 2%.
    assert simulated == pytest.approx(expected, rel=0.1)


def test_limits() -> None:
    for mean, variance, correlation, alignment in [(0.0, 1.0, 0.0, 1.0), (3.0, 0.5, 0.2, 7.0)]:
        options = {"correlation": correlation, "alignment": alignment}
        assert variance_shift_ratio(mean, variance, dropout_second_moment(0.0), **options) == 1  # no noise, no shift
        shifted = variance_shift_ratio(mean, variance, dropout_second_moment(0.5), **options)
        batchwise = variance_shift_ratio(mean, variance, dropout_second_moment(0.5), batchwise=True, **options)
        assert shifted <= batchwise < 1  # the mean's part is not in a batch's variance
    assert variance_shift_ratio(0.0, 2.0, uniform_second_moment(0.1)) == pytest.approx(0.99668, abs=1e-5)
