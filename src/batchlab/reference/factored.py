"""Weights as a direction and a gain, in formulas: what each factorization makes of v and g.

    weight_norm             w = g · v / ‖v‖                        Salimans & Kingma 2016, equation 2
    centered_weight_norm    w = g · (v - v̄) / ‖v - v̄‖              Huang et al. 2017
    weight_standardization  w = g · (v - v̄) / (std(v) + eps)       Qiao et al. 2019
    spectral_norm           w = g · v / σ(v)                       Miyato et al. 2018

Dimension 0 of v counts the output units; v̄, ‖·‖ and std (unbiased) are over all others, each unit by itself. σ is the
largest singular value of v as a matrix (units, everything else), one for all units.

Everything is v's direction times g / length(v). Where g is the length itself the factor is exactly 1, so that a weight
which is taken apart and put together again is the same to the last bit. Lengths are float32 or wider. At v = 0 the
length is floored and constant, so that outputs and gradients of any order are finite.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from batchlab.reference.batch_norm import statistics_dtype

__all__ = [
    "CENTERED",
    "FACTORIZATIONS",
    "direction",
    "effective_weight",
    "gain_shape",
    "leading_singular_vectors",
    "length",
    "lost_share",
    "power_iteration",
]

FACTORIZATIONS: Final = ("weight_norm", "centered_weight_norm", "weight_standardization", "spectral_norm")
CENTERED: Final = ("centered_weight_norm", "weight_standardization")
"""Those that subtract each unit's mean, which their weights therefore cannot have."""


def gain_shape(v: Tensor, factorization: str) -> tuple[int, ...]:
    """Shape of g: one number per output unit, (units, 1, ...); a single one, (1, 1, ...), for spectral_norm."""
    return (1 if factorization == "spectral_norm" else v.shape[0], *[1] * (v.ndim - 1))


def _within_units(v: Tensor) -> list[int]:
    return list(range(1, v.ndim))


def _fan_in(v: Tensor) -> int:
    return v[:1].numel() if v.shape[0] else 0


def _mean(v: Tensor) -> Tensor:
    return v.sum(_within_units(v), keepdim=True) / max(_fan_in(v), 1)


def direction(v: Tensor, factorization: str) -> Tensor:
    """What is scaled: v, or v minus each unit's mean; float32 or wider.

    >>> direction(torch.tensor([[1.0, 3.0]]), "centered_weight_norm").tolist()
    [[-1.0, 1.0]]
    """
    v = v.to(statistics_dtype(v.dtype))
    if factorization not in CENTERED:
        return v
    # Centred twice: what rounding leaves of a mean a thousand times the deviations is removed by the second.
    v = v - _mean(v.detach())
    return v - _mean(v)


def _without_autocast(v: Tensor) -> AbstractContextManager[object]:
    """Autocast would round σ, a product, to half precision."""
    kind = v.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _root(squares: Tensor, floor: float) -> Tensor:
    """√squares, or `floor` without a gradient where that is larger."""
    above = squares > floor**2
    return torch.where(above, torch.where(above, squares, 1).sqrt(), floor)


def length(
    v: Tensor, factorization: str, eps: float, left: Tensor | None = None, right: Tensor | None = None
) -> Tensor:
    """What a direction is divided by, and so the gain with which v is its own weight.

    weight_norm:            max(‖v‖, eps)
    centered_weight_norm:   max(‖v - v̄‖, eps)
    weight_standardization: std(v) + eps,  std² = Σ (v - v̄)² / (n - 1)
    spectral_norm:          σ = leftᵀ V right, or eps where |σ| is smaller

    Shapes:
        v: (units, ...); left: (units,); right: (fan-in,). Returns `gain_shape(v)`, float32 or wider.

    >>> length(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "weight_norm", eps=0.5).tolist()
    [[5.0], [0.5]]
    """
    along = direction(v, factorization)
    if factorization == "spectral_norm":
        if left is None or right is None:
            raise ValueError("spectral_norm needs the singular vectors left and right")
        with _without_autocast(v):
            sigma = torch.dot(left.to(along.dtype), torch.mv(along.flatten(1), right.to(along.dtype)))
        return torch.where(sigma.abs() > eps, sigma, eps).view(gain_shape(v, factorization))
    squares = along.square().sum(_within_units(v), keepdim=True)
    if factorization == "weight_standardization":
        return _root(squares / max(_fan_in(v) - 1, 1), 0.0) + eps
    return _root(squares, eps)


def effective_weight(
    v: Tensor, g: Tensor, factorization: str, eps: float, left: Tensor | None = None, right: Tensor | None = None
) -> Tensor:
    """Return w = direction(v) · (g / length(v)), in v's dtype.

    >>> effective_weight(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]]), "weight_norm", eps=1e-5).tolist()
    [[6.0, 8.0]]
    """
    divisor = length(v, factorization, eps, left, right)
    return (direction(v, factorization) * (g.to(divisor.dtype) / divisor)).to(v.dtype)


def lost_share(weight: Tensor, factorization: str) -> Tensor:
    """How much of each unit's weight a factorization cannot represent: ‖w̄‖ / ‖w‖, 0 to 1; (units,), float64.

    >>> lost_share(torch.tensor([[2.0, 2.0], [1.0, -1.0]]), "centered_weight_norm").tolist()
    [1.0, 0.0]
    """
    if factorization not in CENTERED:
        return torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    wide = weight.detach().double().flatten(1)
    largest = wide.abs().amax(1, keepdim=True) if wide.shape[1] else wide.new_zeros(wide.shape[0], 1)
    wide = wide / torch.where(largest > 0, largest, 1)
    total = wide.square().sum(1)
    lost = _mean(wide).flatten().square() * wide.shape[1]
    return (lost / torch.where(total > 0, total, 1)).sqrt()


def _unit(x: Tensor, before: Tensor, eps: float) -> Tensor:
    """Return x / ‖x‖; what was there before where x has no direction, because from a zero there is no way back."""
    size = torch.linalg.vector_norm(x)
    return torch.where(size > eps, x / size.clamp(min=eps), before)


@torch.no_grad()
def power_iteration(v: Tensor, left: Tensor, right: Tensor, eps: float, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Better estimates of the first singular vectors, without gradient: left ← V right / ‖·‖, right ← Vᵀ left / ‖·‖.

    >>> left, right = torch.ones(2), torch.ones(2)
    >>> left, _ = power_iteration(torch.diag(torch.tensor([5.0, 1.0])), left, right, eps=1e-5, steps=10)
    >>> left.round(decimals=3).tolist()
    [1.0, 0.0]
    """
    with _without_autocast(v):
        matrix = v.detach().to(left.dtype).flatten(1)
        for _ in range(steps):
            left = _unit(torch.mv(matrix, right), left, eps)
            right = _unit(torch.mv(matrix.t(), left), right, eps)
    return left, right


@torch.no_grad()
def leading_singular_vectors(v: Tensor) -> tuple[Tensor, Tensor]:
    """The first singular vectors of v as a matrix, (units,) and (fan-in,), by a full decomposition.

    >>> left, right = leading_singular_vectors(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    >>> left.abs().tolist(), right.abs().tolist()
    ([1.0, 0.0], [0.0, 1.0])
    """
    matrix = v.detach().to(statistics_dtype(v.dtype)).flatten(1)
    if not matrix.numel():
        return matrix.new_zeros(matrix.shape[0]), matrix.new_zeros(matrix.shape[1])
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, 0].contiguous(), right[0].contiguous()
