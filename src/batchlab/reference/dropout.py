"""Multiplicative noise and dropped branches in formulas, for noise that is given (Srivastava et al. 2014)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["drop_path", "dropout", "gaussian_dropout", "uniform_dropout"]


def dropout(x: Tensor, kept: Tensor, p: float) -> Tensor:
    """Zero the entries that are not kept, and scale the others so that the mean stays.

    y = x · m / (1 - p),   m: 1 where kept, else 0; with p = 1 nothing is kept

    Which dropout it is depends on the shape of `kept`, which is broadcast to x's: (N, C, 1, 1) drops channels,
    (1, C, H, W) is one mask for all samples.

    >>> dropout(torch.ones(2, 3), torch.tensor([[True, False, True]]), 0.5)
    tensor([[2., 0., 2.],
            [2., 0., 2.]])
    """
    return x * kept / (1 - p) if p < 1 else x * 0


def gaussian_dropout(x: Tensor, normal: Tensor, p: float) -> Tensor:
    """Multiply by noise of mean 1 and variance p/(1 - p), that of dropout, from standard normal numbers.

    y = x · (1 + √(p / (1 - p)) z),  z ~ N(0, 1)

    >>> gaussian_dropout(torch.ones(3), torch.tensor([-1.0, 0.0, 1.0]), 0.5)
    tensor([0., 1., 2.])
    """
    return x * (1 + math.sqrt(p / (1 - p)) * normal)


def uniform_dropout(x: Tensor, uniform: Tensor, beta: float) -> Tensor:
    """Multiply by noise between 1 - beta and 1 + beta, from uniform numbers between 0 and 1 ("Uout").

    y = x · (1 + β (2 u - 1)),  u ~ U(0, 1)

    >>> uniform_dropout(torch.ones(3), torch.tensor([0.0, 0.5, 1.0]), 0.5)
    tensor([0.5000, 1.0000, 1.5000])
    """
    return x * (1 + beta * (2 * uniform - 1))


def drop_path(x: Tensor, branch: Callable[[Tensor], Tensor], kept: Tensor, scale: float) -> Tensor:
    """Add a branch to the samples that keep it; here it is computed for all of them, and the rest thrown away.

    y_i = x_i + m_i · scale · branch(x)_i,   m_i: 1 where sample i keeps the branch, else 0

    `scale` is 1/(1 - p), or, where the number of kept samples is exact, all samples over kept ones.

    >>> drop_path(torch.zeros(2, 1), torch.ones_like, torch.tensor([True, False]), 2.0)
    tensor([[2.],
            [0.]])
    """
    mask = kept.reshape(-1, *[1] * (x.ndim - 1))
    return x + torch.where(mask, scale * branch(x), 0)
