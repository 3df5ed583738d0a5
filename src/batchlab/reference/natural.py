"""Natural re-parametrization of a linear layer in formulas (Desjardins et al. 2015, PRONG, section 3).

W x + b is written as V U (x - c) + d, where U whitens the layer's input and c is the input's mean, both constants.
Gradient descent on (V, d) is then descent on (W, b) with the inverse of the input's covariance in front:

    W = V U,  b = d - W c,      V ← V - lr ∂l/∂V   is   W ← W - lr Ĝ Uᵀ U,   Ĝ = Σ ∂l/∂y (x - c)ᵀ

With U = (Σ + eps I)^(-1/2), Uᵀ U is (Σ + eps I)⁻¹. (The paper's Algorithm 1, line 7, must read b = d - W c.)

Everything here is float64 whatever the layer is: the inverse of U multiplies by what U divided by.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from batchlab.reference import whitening

__all__ = ["CoMoments", "comoments", "effective", "merge_comoments", "reproject", "respond", "second_moment"]


class CoMoments(NamedTuple):
    """Count, mean and co-moments of a group of samples.

    Attributes:
        count: number of samples, a scalar tensor; need not be whole where old groups count for less.
        mean: (features,); 0 where `count` is 0.
        m2: (features, features), Σ (x - mean) (x - mean)ᵀ.
    """

    count: Tensor  # type: ignore[assignment]  # a field, not tuple.count
    mean: Tensor
    m2: Tensor


def comoments(x: Tensor) -> CoMoments:
    """Count, mean and co-moments over all rows, in float64; centred first, so that a large mean costs no digits.

    Shapes:
        x: (N, features), N may be 0.

    >>> comoments(torch.tensor([[1.0, 5.0], [3.0, 1.0]])).m2.tolist()
    [[2.0, -4.0], [-4.0, 8.0]]
    """
    (centered,), mean = whitening.center(x.double(), x.shape[1])
    return CoMoments(torch.full((), len(x), dtype=mean.dtype, device=x.device), mean, centered @ centered.mT)


def merge_comoments(first: CoMoments, second: CoMoments) -> CoMoments:
    """Co-moments of the union of two groups; either may be empty.

    n = n₁ + n₂,  δ = mean₂ - mean₁,  mean = mean₁ + δ n₂/n,  M2 = M2₁ + M2₂ + δ δᵀ n₁ n₂/n

    >>> a, b = comoments(torch.tensor([[1.0], [3.0]])), comoments(torch.tensor([[8.0]]))
    >>> merge_comoments(a, b) == comoments(torch.tensor([[1.0], [3.0], [8.0]]))
    True
    """
    count = first.count + second.count
    share = torch.where(count > 0, second.count / count, 0)
    delta = second.mean - first.mean
    between = torch.outer(delta, delta) * (first.count * share)
    return CoMoments(count, first.mean + delta * share, first.m2 + second.m2 + between)


def second_moment(group: CoMoments, centered: bool) -> Tensor:
    """Return the covariance M2 / n, or, not centered, E[x xᵀ] = M2 / n + mean meanᵀ; 0 for an empty group.

    >>> second_moment(comoments(torch.tensor([[1.0], [3.0]])), centered=False).item()
    5.0
    """
    sigma = group.m2 / group.count.clamp(min=torch.finfo(group.count.dtype).tiny)
    return sigma if centered else sigma + torch.outer(group.mean, group.mean)


def respond(x: Tensor, v: Tensor, d: Tensor | None, whitening: Tensor, center: Tensor) -> Tensor:
    """Return V U (x - c) + d for each row of x.

    >>> v, u, c = torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([1.0, 1.0])
    >>> respond(torch.tensor([[3.0, 4.0]]), v, torch.tensor([10.0]), u, c).item()
    18.0
    """
    y: Tensor = (x - center) @ whitening.mT @ v.mT
    return y if d is None else y + d


def effective(v: Tensor, d: Tensor | None, whitening: Tensor, center: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weight W = V U and the bias b = d - W c of the plain layer with the same outputs; without d, no bias.

    >>> w, b = effective(torch.tensor([[1.0]]), torch.tensor([5.0]), torch.tensor([[2.0]]), torch.tensor([3.0]))
    >>> w.item(), b.item()
    (2.0, -1.0)
    """
    weight = v @ whitening
    return weight, None if d is None else d - weight @ center


def reproject(
    v: Tensor, d: Tensor | None, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return V and d that with a new (U, c) are what they were with the old: the same W and b.

    W = V U,  V' = W U'⁻¹,  d' = b + W c' = d + W (c' - c)

    The map is linear in (V, d). Applied to a velocity of (V, d) it gives the velocity that moves W and b as before.

    Shapes:
        v: (out, in); d: (out,) or None; old, new: (in, in) and (in,).

    >>> eye, zero = torch.eye(1).double(), torch.zeros(1).double()
    >>> v, d = reproject(torch.tensor([[3.0]]), torch.tensor([1.0]), (eye, zero), (2 * eye, zero + 5))
    >>> v.item(), d.item()
    (1.5, 16.0)
    """
    (whitening, center), (new_whitening, new_center) = ((u.double(), c.double()) for u, c in (old, new))
    weight = v.double() @ whitening
    projected: Tensor = torch.linalg.solve(new_whitening, weight, left=False)
    return projected, None if d is None else d.double() + weight @ (new_center - center)
