"""Batch normalization by the statistics of earlier batches, in formulas: what a layer does over a whole training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from batchlab.reference.batch_norm import moments, normalize, unbiased_variance

__all__ = ["population_batch_norm"]


def population_batch_norm(
    batches: Iterable[Tensor],
    refresh_every: int,
    momentum: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Normalize a training's batches by running statistics, which are constants and refreshed every few batches.

    y = weight · (x - μ) / √(σ² + eps) + bias
    after `refresh_every` batches:   (μ, σ²) ← (1 - momentum) (μ, σ²) + momentum · (mean, n/(n-1) variance) of all their
    samples together; 1 replaces. At the start (μ, σ²) are those of the first batch.

    Returns:
        the outputs, and the running mean and variance in the end.

    >>> batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]]), torch.tensor([[3.0], [5.0]])]
    >>> outputs, mean, var = population_batch_norm(batches, refresh_every=2, eps=0.0)
    >>> mean.item(), outputs[2].flatten().tolist()
    (3.0, [0.0, 0.774...])
    """
    outputs: list[Tensor] = []
    collected: list[Tensor] = []
    mean, var = torch.zeros(0), torch.ones(0)
    for x in batches:
        values = x.detach()
        if not outputs:
            group = moments(values)
            mean, var = group.mean, unbiased_variance(group)
        outputs.append(normalize(x, mean, var, weight, bias, eps))
        # One row a sample and position, whatever the batches' shapes are.
        collected.append(values.movedim(1, -1).reshape(-1, x.shape[1]))
        if len(collected) == refresh_every:
            group = moments(torch.cat(collected))
            mean = (1 - momentum) * mean + momentum * group.mean
            var = (1 - momentum) * var + momentum * unbiased_variance(group)
            collected = []
    return outputs, mean, var
