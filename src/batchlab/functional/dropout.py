"""Multiplicative noise with mean 1: dropout with shared axes, Gaussian and uniform dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab.functional.dropout_pattern import check_rate

__all__ = ["check_beta", "check_gaussian_rate", "checked_share", "dropout", "gaussian_dropout", "uniform_dropout"]


def checked_share(share: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the shared dimensions as a tuple; TypeError unless they are whole numbers."""
    dims = () if share is None else (share,) if isinstance(share, int) else tuple(share)
    if any(isinstance(dim, bool) or not isinstance(dim, int) for dim in dims):
        raise TypeError(f"share is {share!r}; give the dimensions that share a random number, as (0,) or (2, 3)")
    return dims


def check_gaussian_rate(p: float) -> None:
    """Raise unless p is a rate whose noise has a finite variance."""
    check_rate(p)
    if p == 1:
        raise ValueError("p is 1, which needs noise of infinite variance p/(1 - p); p must be below 1")


def check_beta(beta: float) -> None:
    """Raise unless beta is the half-width of noise that does not change signs."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta!r}; noise is drawn from -beta to beta, and beta is from 0 to 1")


def _check_floating(input: Tensor) -> None:  # noqa: A002  # torch's name
    if not input.is_floating_point():
        raise TypeError(f"the input has dtype {input.dtype}; noise needs a floating-point input")


def _disturbed(input: Tensor, noise: Tensor, inplace: bool) -> Tensor:  # noqa: A002
    # One operation, which rounds once; 1 + r would be rounded before, which tells in half precision.
    return input.addcmul_(input, noise) if inplace else torch.addcmul(input, input, noise)


def dropout(
    input: Tensor,  # noqa: A002
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    share: int | Sequence[int] | None = None,
) -> Tensor:
    """Drop entries, with one random number for all entries along the shared dimensions; see `batchlab.nn.Dropout`.

    >>> import torch
    >>> torch.manual_seed(0)
    <torch._C.Generator ...>
    >>> dropout(torch.ones(2, 4), 0.5, share=0)      # the rows share their mask
    tensor([[...], [...]])
    """
    check_rate(p)
    dims = checked_share(share)
    for dim in dims:
        if not -input.ndim <= dim < input.ndim:
            raise ValueError(
                f"share is {share}, and the input has shape {tuple(input.shape)}, without a dimension {dim}"
            )
    if not dims:
        return F.dropout(input, p, training, inplace)
    _check_floating(input)
    if not training or p == 0:
        return input
    shared = {dim % input.ndim for dim in dims}
    mask = F.dropout(input.new_ones([1 if dim in shared else size for dim, size in enumerate(input.shape)]), p)
    return input.mul_(mask) if inplace else input * mask


def gaussian_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    """Multiply by normal noise with mean 1 and variance p/(1 - p); see `batchlab.nn.GaussianDropout`.

    >>> import torch
    >>> gaussian_dropout(torch.ones(3), 0.5, training=False)
    tensor([1., 1., 1.])
    """
    check_gaussian_rate(p)
    _check_floating(input)
    if not training or p == 0:
        return input
    return _disturbed(input, torch.randn_like(input, requires_grad=False).mul_(math.sqrt(p / (1 - p))), inplace)


def uniform_dropout(input: Tensor, beta: float = 0.1, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    """Multiply by uniform noise between 1 - beta and 1 + beta; see `batchlab.nn.UniformDropout`.

    >>> import torch
    >>> y = uniform_dropout(torch.ones(1000), 0.1)
    >>> bool(((y - 1).abs() <= 0.1 + 1e-6).all())
    True
    """
    check_beta(beta)
    _check_floating(input)
    if not training or beta == 0:
        return input
    return _disturbed(input, torch.rand_like(input, requires_grad=False).mul_(2).sub_(1).mul_(beta), inplace)
