"""What dropout does to the statistics of batch norms behind it: measured, and what theory expects."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from batchlab.nn import BatchNorm1d, BatchNorm2d, BatchwiseDropout
from batchlab.reference.batch_norm import Moments, merge_moments, moments
from batchlab.reference.variance_shift import dropout_second_moment, variance_shift_ratio

__all__ = ["expected_shifts", "mean_shifts"]

PART = 1000  # images at a time
NORMALIZATIONS = (BatchNorm1d, BatchNorm2d)
DROPOUTS = (nn.Dropout, nn.Dropout2d, BatchwiseDropout)


@torch.no_grad()
def _entering(network: nn.Sequential, images: Tensor) -> dict[str, Moments]:
    """Moments of what enters each batch norm and each linear layer in evaluation, by the layer's name."""
    found: dict[str, Moments] = {}
    network.eval()
    for x in images.split(PART):
        for name, module in network.named_children():
            if isinstance(module, (*NORMALIZATIONS, nn.Linear)):
                own = moments(x.double())
                found[name] = merge_moments(found[name], own) if name in found else own
            x = module(x)
    return found


def mean_shifts(network: nn.Sequential, images: Tensor) -> dict[str, float]:
    """How far the mean that each batch norm subtracts is from the mean of what it gets in evaluation.

    shift = mean over channels of |r - μ| / √(u + eps)

    r is the running mean; μ and u are mean and variance of the layer's input on `images`. 0: no shift.
    """
    found = _entering(network, images)
    shifts = {}
    for name, layer in network.named_children():
        if isinstance(layer, NORMALIZATIONS):
            assert layer.running_mean is not None
            count, mean, m2 = found[name]
            distances = (layer.running_mean.double() - mean).abs() / (m2 / (count - 1) + layer.eps).sqrt()
            shifts[name] = round(float(distances.mean()), 6)
    return shifts


def _ratio(mean: float, variance: float, common: float, dropout: nn.Module) -> float:
    """Var_train / Var_test; `common` is what all inputs together add to both variances."""
    if variance == 0:
        return 1.0
    batchwise = isinstance(dropout, BatchwiseDropout)
    p: float = dropout.p  # type: ignore[assignment]
    # Only correlation · (alignment - 1) enters the formula, here with what the data has of it.
    ratio = variance_shift_ratio(
        mean, variance, dropout_second_moment(p), correlation=common / variance, alignment=2.0, batchwise=batchwise
    )
    return 1 / ratio if ratio > 0 else 1.0


def _behind_linear(inputs: Moments, output: Moments, weight: Tensor, dropout: nn.Module) -> list[float]:
    """A ratio for each unit: c² and v are those of its inputs, weighted with its squared weights."""
    squares = weight.detach().double().square()
    total = squares.sum(1)
    means = squares @ inputs.mean.square() / total
    variances = squares @ (inputs.m2 / inputs.count) / total
    commons = output.m2 / output.count / total - variances
    rows = zip(means.sqrt().tolist(), variances.tolist(), commons.tolist(), strict=True)
    return [_ratio(mean, variance, common, dropout) for mean, variance, common in rows]


def expected_shifts(network: nn.Sequential, images: Tensor) -> dict[str, float]:
    """What theory expects `variance_shifts` to be, from the trained weights and the data in evaluation.

    shift = mean over channels of Var_train / Var_test

    It counts the one dropout that is directly in front of a batch norm, or of the linear layer in front of it, and
    takes 1 where no dropout comes before. Left out are batch norms for which another layer lies between, a convolution
    for one: the positions that a dropped feature map takes along are correlated.

    Source: Li et al. 2018 (arXiv 1801.05134), cases (a) and (b), see `batchlab.reference.variance_shift`.
    """
    found = _entering(network, images)
    children = [("", nn.Identity()), ("", nn.Identity()), *network.named_children()]
    shifts = {}
    noisy = False
    for (_, second), (before, first), (name, layer) in zip(children, children[1:], children[2:], strict=False):
        noisy = noisy or isinstance(first, DROPOUTS)
        if not isinstance(layer, NORMALIZATIONS):
            continue
        if not noisy:
            ratios = [1.0]
        elif isinstance(first, DROPOUTS):
            count, mean, m2 = found[name]
            pairs = zip(mean.tolist(), (m2 / count).tolist(), strict=True)
            ratios = [_ratio(c, v, 0.0, first) for c, v in pairs]
        elif isinstance(first, nn.Linear) and isinstance(second, DROPOUTS):
            ratios = _behind_linear(found[before], found[name], first.weight, second)
        else:
            continue
        shifts[name] = round(math.fsum(ratios) / len(ratios), 6)
    return shifts
