"""Gradients that whitening needs and autograd has not: of a covariance in float64, and of (Σ + eps I)^(-1/2).

Autograd's gradient of an eigendecomposition divides by differences of eigenvalues. That of W = (Σ + eps I)^(-1/2)
needs no such division: with R = W⁻¹, differentiating R W = I and R R = Σ + eps I gives

    R dW + dW R = -W dΣ W,   so   ∂l/∂Σ = -W Y W   with Y from   R Y + Y R = ∂l/∂W

In the eigenbasis Y is ∂l/∂W over the sums √λᵢ + √λⱼ, all of them positive, so equal eigenvalues are like any others
(the divided differences of λ^(-1/2), Daleckii & Krein 1965). The solution of such an equation is differentiated by
solving two more, so gradients of any order exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchlab.reference import whitening as reference

__all__ = ["covariance", "inverse_square_root"]


class _Covariance(torch.autograd.Function):
    """Σ = 1/n Σₛ xₛ xₛᵀ in float64, which keeps x as it is for the backward pass instead of a copy twice the size."""

    generate_vmap_rule = True

    @staticmethod
    def forward(centered: Tensor) -> Tensor:
        return reference.covariance(centered)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (centered,) = ctx.saved_tensors
        (grad,) = grad_outputs
        symmetric: Tensor = (grad + grad.mT) / max(centered.shape[-1], 1)
        grad_centered: Tensor = symmetric.to(centered.dtype) @ centered
        return grad_centered


class _SolveSylvester(torch.autograd.Function):
    """Y from R Y + Y R = G, given R = U diag(roots) Uᵀ, symmetric, and its decomposition, which takes no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(root: Tensor, right: Tensor, roots: Tensor, eigenvectors: Tensor) -> Tensor:  # noqa: ARG004
        rotated = eigenvectors.mT @ right @ eigenvectors
        return eigenvectors @ (rotated / (roots[..., :, None] + roots[..., None, :])) @ eigenvectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        root, _, roots, eigenvectors = inputs
        ctx.save_for_backward(root, output, roots, eigenvectors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        root, solution, roots, eigenvectors = ctx.saved_tensors
        adjoint = _solve_sylvester(root, grad_outputs[0], roots, eigenvectors)
        return -(adjoint @ solution.mT + solution.mT @ adjoint), adjoint, None, None


def _solve_sylvester(root: Tensor, right: Tensor, roots: Tensor, eigenvectors: Tensor) -> Tensor:
    solution: Tensor = _SolveSylvester.apply(root, right, roots, eigenvectors)  # type: ignore[no-untyped-call]
    return solution


class _InverseSquareRoot(torch.autograd.Function):
    """W = (Σ + floor I)^(-1/2), and the decomposition of its inverse, for whoever differentiates."""

    generate_vmap_rule = True

    @staticmethod
    def forward(sigma: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        eigenvalues, eigenvectors = torch.linalg.eigh(sigma)
        roots = (eigenvalues.clamp(min=0) + floor[..., 0]).sqrt()
        whitening: Tensor = (eigenvectors / roots[..., None, :]) @ eigenvectors.mT
        return whitening, roots, eigenvectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        sigma, floor, whitening, roots, eigenvectors = ctx.saved_tensors
        # R is written as a function of Σ for the sake of gradients of higher order; its decomposition is at hand.
        root = sigma @ whitening + floor * whitening
        solution = _solve_sylvester(root, grad_outputs[0], roots, eigenvectors)
        return -(whitening @ solution @ whitening), None


def covariance(centered: Tensor) -> Tensor:
    """`reference.whitening.covariance`, with a backward pass that keeps no float64 copy of the input."""
    sigma: Tensor = _Covariance.apply(centered)  # type: ignore[no-untyped-call]
    return sigma


def inverse_square_root(sigma: Tensor, floor: Tensor) -> Tensor:
    """(Σ + floor I)^(-1/2) of symmetric matrices, differentiable to any order, whatever the eigenvalues.

    Shapes:
        sigma and the result: (groups, size, size), float64; floor: (groups, 1, 1), positive, takes no gradient.

    >>> import torch
    >>> sigma = torch.eye(3, dtype=torch.float64)[None].requires_grad_()     # three equal eigenvalues
    >>> inverse_square_root(sigma, torch.zeros(1, 1, 1, dtype=torch.float64)).sum().backward()
    >>> sigma.grad.unique().tolist()
    [-0.5]
    """
    return _InverseSquareRoot.apply(sigma, floor)[0]  # type: ignore[no-untyped-call,no-any-return]
