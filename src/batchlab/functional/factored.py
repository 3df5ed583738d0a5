"""Factored weights as functions: put a weight together from its factors, and find the factors of a weight."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from batchlab.reference import factored as reference
from batchlab.reference.factored import FACTORIZATIONS

__all__ = ["Factors", "check_factorization", "factor_weight", "factored_weight"]


class Factors(NamedTuple):
    """The factors of a weight.

    Attributes:
        v: the direction, of the weight's shape.
        g: the gain, (units, 1, ...), or (1, 1, ...) for spectral_norm.
        left: first left singular vector of v, (units,); spectral_norm only.
        right: first right singular vector of v, (fan-in,); spectral_norm only.

    >>> factor_weight(torch.tensor([[3.0, 4.0]])).g
    tensor([[5.]])
    """

    v: Tensor
    g: Tensor
    left: Tensor | None = None
    right: Tensor | None = None


def check_factorization(factorization: str, eps: float) -> None:
    """Raise ValueError unless the factorization is known, and eps positive and finite."""
    if factorization not in FACTORIZATIONS:
        raise ValueError(f"factorization is {factorization!r}; allowed are {', '.join(map(repr, FACTORIZATIONS))}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}; it keeps a zero weight's length from being zero and must be above 0")


def _check_tensor(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} is {value.dtype}; a factored weight needs a real floating-point dtype")
    if value.ndim < 2:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; it must be (units, fan-in, ...), two dimensions or more"
        )


def _check_vectors(v: Tensor, factorization: str, left: Tensor | None, right: Tensor | None) -> None:
    if factorization != "spectral_norm":
        return
    if left is None or right is None:
        raise ValueError("spectral_norm needs left and right, the first singular vectors of v: see factor_weight")
    needed = ((v.shape[0],), (math.prod(v.shape[1:]),))
    if (tuple(left.shape), tuple(right.shape)) != needed:
        raise ValueError(
            f"left has shape {tuple(left.shape)} and right {tuple(right.shape)}; for v of shape {tuple(v.shape)} they "
            f"must be {needed[0]} and {needed[1]}"
        )


def factored_weight(
    v: Tensor,
    g: Tensor,
    factorization: str = "weight_norm",
    eps: float = 1e-5,
    *,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """Put a weight together from a direction and a gain; gradients flow to both.

    weight_norm:            w = g · v / max(‖v‖, eps)
    centered_weight_norm:   w = g · (v - v̄) / max(‖v - v̄‖, eps)
    weight_standardization: w = g · (v - v̄) / (std(v) + eps),  std unbiased
    spectral_norm:          w = g · v / σ,  σ = leftᵀ V right, or eps where |σ| is smaller

    Norms, means and deviations are over all dimensions but the first, in float32 or wider. Gradients of weight_norm
    are orthogonal to v, those of the centred ones also to a constant. The only difference to torch's formulas is the
    floor, which makes values and gradients at v = 0 finite. (A fan-in of 1 has no deviation: centred weights are 0.)

    Shapes:
        v and the result: (units, ...), any floating dtype, the same one. g: (units, 1, ...), for spectral_norm
        (1, 1, ...). left: (units,), right: (fan-in,).

    Args:
        v: direction; only its direction matters.
        g: gain.
        factorization: "weight_norm", "centered_weight_norm", "weight_standardization" or "spectral_norm".
        eps: smallest length (added to the deviation in weight_standardization).
        left: first left singular vector of v, or an estimate of it; taken as a constant.
        right: first right singular vector, likewise.

    Raises:
        ValueError: an unknown factorization, a shape that does not fit, eps not above 0, or vectors are missing.
        TypeError: v or g is not floating-point.

    Source: Salimans & Kingma 2016, equation 2; Huang et al. 2017; Qiao et al. 2019; Miyato et al. 2018, equation 8.

    >>> import torch
    >>> from batchlab.functional import factored_weight
    >>> factored_weight(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[10.0], [1.0]]))
    tensor([[6., 8.],
            [0., 0.]])
    """
    check_factorization(factorization, eps)
    _check_tensor("v", v)
    if not g.is_floating_point():
        raise TypeError(f"g is {g.dtype}; a factored weight needs a real floating-point dtype")
    needed = reference.gain_shape(v, factorization)
    if g.shape != needed:
        raise ValueError(f"g has shape {tuple(g.shape)}; for v of shape {tuple(v.shape)} it must be {needed}")
    _check_vectors(v, factorization, left, right)
    return reference.effective_weight(v, g, factorization, eps, left, right)


def _check_representable(weight: Tensor, factorization: str) -> None:
    # A weight that was centred, then rounded to its dtype, has a mean of up to eps/2 of its norm.
    share = reference.lost_share(weight, factorization)
    lost = (share > 4 * torch.finfo(weight.dtype).eps).nonzero().flatten().tolist()
    if lost:
        shown = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
        raise ValueError(
            f"{factorization} has no weights with a mean, and {len(lost)} of {weight.shape[0]} units have one (units "
            f"{shown}): up to {float(share.max()):.3g} of a unit's norm would be lost. project=True drops the means, "
            "which changes the function; weight_norm keeps it"
        )


@torch.no_grad()
def factor_weight(
    weight: Tensor, factorization: str = "weight_norm", eps: float = 1e-5, *, project: bool = False
) -> Factors:
    """Find factors of which `factored_weight` makes the given weight: v = weight, g = the length of v.

    Put together again the weight is the same, bitwise in float32 and float64 (for the centred factorizations up to
    the rounding of a mean that is zero), and to the rounding of g in half precision. A unit that is zero gets g = eps:
    it is zero again, its gradient with respect to v is that of a plain weight, and g can grow.

    Shapes:
        weight: (units, ...), any floating dtype. The factors are described at `Factors`.

    Args:
        weight: taken as it is; `Factors.v` is this tensor, not a copy.
        factorization: see `factored_weight`.
        eps: see `factored_weight`; give the same there.
        project: accept that centred factorizations drop the mean of each unit; otherwise such weights are refused.

    Raises:
        ValueError: an unknown factorization, eps not above 0, values that are not finite, a gain that the dtype cannot
            hold, or a mean that would be lost: the message says in how many units and how large.
        TypeError: the weight is not floating-point.

    Source: Salimans & Kingma 2016, section 2.

    >>> import torch
    >>> from batchlab.functional import factor_weight, factored_weight
    >>> weight = torch.randn(4, 3)
    >>> factors = factor_weight(weight)
    >>> torch.equal(factored_weight(factors.v, factors.g), weight)
    True
    """
    check_factorization(factorization, eps)
    _check_tensor("weight", weight)
    if not weight.is_meta and not weight.isfinite().all():
        raise ValueError("the weight has values that are inf or NaN, which have no direction")
    if not project and not weight.is_meta:
        _check_representable(weight, factorization)
    left, right = reference.leading_singular_vectors(weight) if factorization == "spectral_norm" else (None, None)
    g = reference.length(weight, factorization, eps, left, right).to(weight.dtype)
    if not g.is_meta and not g.isfinite().all():
        raise ValueError(
            f"a unit's length is too large for {weight.dtype}: scale the weight down, or use a wider dtype"
        )
    return Factors(weight, g, left, right)
