"""Whitening per batch in formulas (Huang et al. 2018, Decorrelated BN, section 3; Huang et al. 2019, IterNorm).

Channels are dimension 1 and fall into groups of neighbours; each group is whitened by itself. Everything here is plain
PyTorch. Gradients are autograd's own, so those of `zca` exist only where all eigenvalues differ;
`batchlab.functional.whiten` has the ones that always exist.

Covariances and what is made of them are float64 whatever the input is: whitening divides by the smallest eigenvalues,
and in float32 those of ten correlated channels are rounding.
"""

from typing import Final

import torch
from torch import Tensor

from batchlab.reference import batch_norm

__all__ = [
    "METHODS",
    "apply_projection",
    "center",
    "cholesky",
    "color",
    "covariance",
    "floor",
    "grouped",
    "newton",
    "projection",
    "ungrouped",
    "zca",
]

METHODS: Final = ("zca", "cholesky", "newton")

# The square of float32's rounding, relative to the largest eigenvalue: below it a direction holds nothing else.
RELATIVE_FLOOR: Final = 2.0**-48


def grouped(x: Tensor, group_size: int) -> Tensor:
    """Sort an input by group, channel of the group and sample: (N, C, ...) becomes (C/group_size, group_size, n).

    >>> grouped(torch.randn(8, 6, 5, 5), 2).shape
    torch.Size([3, 2, 200])
    """
    channels = x.shape[1]
    return x.movedim(1, 0).reshape(channels // group_size, group_size, x.numel() // channels)


def ungrouped(rows: Tensor, shape: torch.Size) -> Tensor:
    """Undo `grouped` for an input of that shape.

    >>> x = torch.randn(8, 6, 5)
    >>> torch.equal(ungrouped(grouped(x, 3), x.shape), x)
    True
    """
    return rows.reshape(shape[1], shape[0], *shape[2:]).movedim(0, 1)


def center(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Subtract each channel's mean, in two steps, so that a large mean costs no digits.

    Shapes:
        x: (N, C, ...).
        returns: `grouped(x - mean)`, in `statistics_dtype(x.dtype)`; the mean, (C,). An empty batch has mean 0.

    >>> rows, mean = center(torch.tensor([[1e6], [1e6 + 2]]), 1)
    >>> rows.flatten().tolist(), mean.tolist()
    ([-1.0, 1.0], [1000001.0])
    """
    shifted, offset = batch_norm.center(x)
    rows = grouped(shifted, group_size)
    residue = rows.sum(-1, keepdim=True) / max(rows.shape[-1], 1)
    return rows - residue, offset + residue.flatten()


def covariance(centered: Tensor) -> Tensor:
    """Covariance of each group with 1/n, in float64; 0 for an empty batch.

    Σ = 1/n Σₛ (xₛ - mean) (xₛ - mean)ᵀ

    Shapes:
        centered: (groups, group_size, n). Returns (groups, group_size, group_size).

    >>> covariance(torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])).tolist()
    [[[1.0, 2.0], [2.0, 4.0]]]
    """
    wide = centered.double()
    return wide @ wide.mT / max(centered.shape[-1], 1)


def floor(sigma: Tensor, eps: float) -> Tensor:
    """What is added to the diagonal of each covariance: eps, and 2⁻⁴⁸ of the trace, which counts beyond a trace of 1e9.

    Without the second term eps would be lost beside large variances, and the matrix could be singular again.

    Shapes:
        sigma: (groups, group_size, group_size). Returns (groups, 1, 1), without gradient.
    """
    trace = sigma.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
    return (eps + RELATIVE_FLOOR * trace)[..., None, None]


def _regularized(sigma: Tensor, eps: float) -> Tensor:
    return sigma + floor(sigma, eps) * torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)


def zca(sigma: Tensor, eps: float) -> Tensor:
    """Return (Σ + eps I)^(-1/2), symmetric: of all whitenings the one that changes the input least.

    Σ = U Λ Uᵀ,  W = U (Λ + eps)^(-1/2) Uᵀ

    The usual alternative, (Λ + eps)^(-1/2) Uᵀ (PCA), is not offered: its axes swap places and signs between batches.

    >>> zca(torch.tensor([[[4.0, 0.0], [0.0, 0.25]]], dtype=torch.float64), 1e-12).round(decimals=6).tolist()
    [[[0.5, 0.0], [0.0, 2.0]]]
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(sigma)
    # A covariance has no negative eigenvalues; what is below 0 here is rounding.
    scales = (eigenvalues.clamp(min=0)[..., None, :] + floor(sigma, eps)).rsqrt()
    matrix: Tensor = (eigenvectors * scales) @ eigenvectors.mT
    return matrix


def cholesky(sigma: Tensor, eps: float) -> Tensor:
    """Return L⁻¹, where L Lᵀ = Σ + eps I and L is lower triangular: each channel is freed of those before it.

    >>> cholesky(torch.tensor([[[4.0, 2.0], [2.0, 5.0]]], dtype=torch.float64), 1e-12).round(decimals=6).tolist()
    [[[0.5, 0.0], [-0.25, 0.5]]]
    """
    factor = torch.linalg.cholesky(_regularized(sigma, eps))
    identity = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device).expand_as(factor)
    matrix: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return matrix


def newton(sigma: Tensor, eps: float, iterations: int) -> Tensor:
    """Approach (Σ + eps I)^(-1/2) by Newton's iteration (IterNorm, Algorithm 1).

    A = (Σ + eps I) / tr(Σ + eps I),  P₀ = I,  Pₖ₊₁ = (3 Pₖ - Pₖ³ A) / 2,  W = P_T / √tr(Σ + eps I)

    Written with Yₖ = A Pₖ beside it, which is the same and keeps rounding from growing: T = (3 I - P Y)/2, P ← T P,
    Y ← Y T. A direction with a share a of the trace gets a variance near 1 once 1.5^(2T) a is well above 1, and about
    1.5^(2T) a before that. With `iterations` = 0 the group is divided by the root of its trace.

    >>> newton(torch.tensor([[[4.0, 0.0], [0.0, 0.25]]], dtype=torch.float64), 1e-12, 20).round(decimals=6).tolist()
    [[[0.5, 0.0], [0.0, 2.0]]]
    """
    regular = _regularized(sigma, eps)
    trace = regular.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    identity = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    p, y = identity.expand_as(regular), regular / trace
    for _ in range(iterations):
        step = (3 * identity - p @ y) / 2
        p, y = step @ p, y @ step
    return p / trace.sqrt()


def projection(sigma: Tensor, eps: float, method: str, iterations: int = 5) -> Tensor:
    """Return the whitening matrix of each group by one of `METHODS`, (groups, group_size, group_size)."""
    if method == "newton":
        return newton(sigma, eps, iterations)
    return {"zca": zca, "cholesky": cholesky}[method](sigma, eps)


def color(whitening: Tensor, weight: Tensor | None) -> Tensor:
    """Multiply each whitening matrix from the left: by diag(weight) for (C,), by a matrix for (groups, size, size)."""
    if weight is None:
        return whitening
    wide = weight.to(whitening.dtype)
    if weight.ndim == 1:
        return wide.view(*whitening.shape[:2], 1) * whitening
    return wide @ whitening


def apply_projection(centered: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return matrix · centered + bias, one product per group, in the dtype of `centered`.

    Shapes:
        centered and the result: (groups, group_size, n); matrix: (groups, group_size, group_size); bias: (C,).
    """
    matrix = matrix.to(centered.dtype)
    if bias is None:
        return matrix @ centered
    return torch.baddbmm(bias.to(centered.dtype).view(*matrix.shape[:2], 1), matrix, centered)
