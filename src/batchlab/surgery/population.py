"""Population statistics from the moments of many batches (Ioffe & Szegedy 2015, Algorithm 2, line 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from batchlab.reference.batch_norm import Moments, merge_moments, unbiased_variance
from batchlab.surgery.layers import ChannelNorm, running_statistics

__all__ = ["ESTIMATORS", "Population", "add_batch", "empty_population"]


class Population(NamedTuple):
    """What is kept of all batches so far.

    Attributes:
        samples: count, mean and M2 of all samples, as if they were one batch.
        within: the batches' unbiased variances; its `mean` is their average, weighted by `count`, the samples of the
            batches that have one. Its `m2` has no meaning here.
    """

    samples: Moments
    within: Moments


def empty_population(layer: ChannelNorm) -> Population:
    """Return the population of no batches, in float64."""
    known = next(value for value in running_statistics(layer) if value is not None)
    zeros = torch.zeros_like(known, dtype=torch.float64)
    nothing = Moments(zeros.new_zeros(()), zeros, zeros)
    return Population(nothing, nothing)


def add_batch(population: Population, batch: Moments) -> Population:
    """Return the population with one more batch.

    >>> from batchlab.reference.batch_norm import moments
    >>> population = empty_population(torch.nn.BatchNorm1d(1))
    >>> for batch in ([[0.0], [2.0]], [[10.0], [12.0]]):
    ...     population = add_batch(population, moments(torch.tensor(batch).double()))
    >>> ESTIMATORS["pooled"](population).item()       # of 0, 2, 10, 12
    34.666666666666664
    >>> ESTIMATORS["algorithm2"](population).item()   # the average of 2 and 2
    2.0
    """
    usable = batch.count * (batch.count > 1)  # one sample has no variance
    spread = Moments(usable, unbiased_variance(batch), torch.zeros_like(batch.m2))
    return Population(merge_moments(population.samples, batch), merge_moments(population.within, spread))


ESTIMATORS: Final[dict[str, Callable[[Population], Tensor]]] = {
    "pooled": lambda population: unbiased_variance(population.samples),
    "algorithm2": lambda population: population.within.mean,
}
"""Variance of the population, by name; the mean is `samples.mean` in both: E_B[μ_B] weighted by count is the mean."""
