"""Whitening per batch as functions (Decorrelated BN, IterNorm): one product of matrices for each group of channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchlab.functional import whitening_gradient
from batchlab.functional.autocast import full_precision
from batchlab.functional.batch_norm_training import samples_per_channel
from batchlab.functional.running_statistics import check_momentum, update_in_place
from batchlab.functional.whitening_arguments import (
    check_sample_count,
    check_tensors,
    check_whitening,
    running_statistics,
    shape_of,
)
from batchlab.reference import whitening as reference
from batchlab.reference.batch_norm import per_channel, statistics_dtype

__all__ = ["update_whitening_statistics", "whiten", "whitening_matrix"]


def _projection(sigma: Tensor, eps: float, method: str, iterations: int) -> Tensor:
    # A decomposition of NaN is an exception; a normalization of NaN is NaN, and loss scaling skips such a step.
    finite = sigma.isfinite().flatten(-2).all(-1)[..., None, None]
    sigma = torch.where(finite, sigma, torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device))
    if method == "zca":
        matrix = whitening_gradient.inverse_square_root(sigma, reference.floor(sigma, eps))
    else:
        matrix = reference.projection(sigma, eps, method, iterations)
    return torch.where(finite, matrix, math.nan)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """The result in the dtype and memory format of the input."""
    y = y.to(x.dtype)
    for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and not x.is_contiguous() and x.is_contiguous(memory_format=memory_format):
            return y.contiguous(memory_format=memory_format)
    return y.contiguous()


def _center(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    # A batch with hardly more samples than channels has directions of (nearly) no variance. Its gradient is then a
    # difference of terms 1/√eps times as large, which float32 does not hold; and being small, it costs little.
    if samples_per_channel(x) <= 4 * size:
        x = x.double()
    return reference.center(x, size)


def _apply(
    rows: Tensor, sigma: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, method: str, iterations: int
) -> Tensor:
    # Scale or color the matrix, not the samples: one product whatever the weight.
    matrix = reference.color(_projection(sigma, eps, method, iterations), weight)
    return reference.apply_projection(rows, matrix, bias)


def _update(
    running: tuple[Tensor, Tensor],
    mean: Tensor,
    sigma: Tensor,
    samples: int,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
) -> None:
    unbiased = sigma.detach() * (samples / max(samples - 1, 1))
    update_in_place(*running, mean.detach(), unbiased, samples, momentum, num_batches_tracked, "propagate")


def whitening_matrix(covariance: Tensor, eps: float = 1e-5, *, method: str = "zca", iterations: int = 5) -> Tensor:
    """Return the matrix W that whitens what has the given covariance: W (Σ + eps I) Wᵀ = I.

    zca:       W = (Σ + eps I)^(-1/2), symmetric
    cholesky:  W = L⁻¹ with L Lᵀ = Σ + eps I, lower triangular
    newton:    W ≈ (Σ + eps I)^(-1/2) by `iterations` steps of Newton's iteration

    Gradients (reverse mode) are right at any order, for equal eigenvalues too. A covariance with inf or NaN gives NaN.

    Shapes:
        covariance: (groups, size, size), symmetric. Returns the same shape, in float64.

    Args:
        covariance: of each group of channels.
        eps: added to the diagonal.
        method: "zca", "cholesky" or "newton".
        iterations: of "newton".

    Raises:
        ValueError: a shape or setting that does not fit.
        torch.linalg.LinAlgError: with "cholesky", a matrix with negative eigenvalues: no covariance.

    Source: Huang et al. 2018, equation 4 (zca); Huang et al. 2019, Algorithm 1 (newton).

    >>> import torch
    >>> from batchlab.functional import whitening_matrix
    >>> sigma = torch.tensor([[[4.0, 2.0], [2.0, 5.0]]])
    >>> w = whitening_matrix(sigma, method="cholesky")
    >>> (w @ sigma.double() @ w.mT).round(decimals=4).tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """
    check_whitening(eps, method, iterations)
    if covariance.ndim != 3 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(f"covariance has shape {shape_of(covariance)}; it must be (groups, size, size)")
    with full_precision(covariance):
        return _projection(covariance.double(), eps, method, iterations)


def whiten(
    x: Tensor,
    running_mean: Tensor | None,
    running_covariance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    method: str = "zca",
    group_size: int | None = None,
    iterations: int = 5,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Center the channels, remove the correlations within each group of them, then scale or color, and shift.

    training:      y = weight · W (x - μ) + bias,  W of Σ, μ and Σ = 1/n Σ (x - μ)(x - μ)ᵀ of this batch
                   running ← (1 - momentum) · running + momentum · (μ, n/(n-1) Σ), in place
    not training:  the same with the running statistics, which stay as they are; W is computed from them at each call

    `whitening_matrix` says what W is. Statistics of the samples are float32 or wider, covariances and W float64.
    Gradients flow through μ, Σ and W, are finite for any batch, and are right at any order, by reverse mode alone:
    forward-mode derivatives (`torch.func.jvp`, `hessian`) are not there; `jacrev(jacrev(...))` is.

    Directions in which the batch does not vary (fewer samples than channels, constant or repeated channels) come out
    as 0, up to rounding, with gradients of order 1/√eps at most. Rounding of a float32 input is of size 6e-8 √(λ/λ'),
    λ and λ' the largest and the smallest eigenvalue of Σ + eps I; up to 4 · group_size samples are whitened in float64.

    Shapes:
        x and the result: (N, C, ...), any floating dtype; the result has x's dtype and memory format.
        running_mean, bias: (C,).
        running_covariance: (C/group_size, group_size, group_size), float64 where it can be.
        weight: (C,), or (C/group_size, group_size, group_size): a matrix to color each group with.

    Args:
        x: the input.
        running_mean: moving average of the means, or None with `training=True`.
        running_covariance: moving average of the unbiased covariances, or None with `training=True`.
        weight: None is 1.
        bias: None is 0.
        training: whiten with the batch's own statistics.
        momentum: weight of the new batch in the running statistics, 0 to 1; None: the plain average over
            `num_batches_tracked` batches.
        eps: added to the diagonal of the covariance; above 0.
        method: "zca", "cholesky" or "newton".
        group_size: channels whitened together, neighbours; None: all.
        iterations: of "newton".
        num_batches_tracked: integer scalar tensor, incremented in place by each batch that counts.

    Raises:
        ValueError: a shape does not fit, a setting is unknown, the running statistics are missing, or a batch has one
            value per channel.
        TypeError: x is not floating-point.

    Source: Huang et al. 2018, Algorithms 1 and 2; Huang et al. 2019, Algorithm 1.

    >>> import torch
    >>> from batchlab.functional import whiten
    >>> x = torch.tensor([[2.0, 2.0], [-2.0, -2.0], [1.0, -1.0], [-1.0, 1.0]])
    >>> y = whiten(x, None, None, training=True)
    >>> (y.T @ y / 4).round(decimals=3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    tensors = {"running_mean": running_mean, "running_covariance": running_covariance, "weight": weight, "bias": bias}
    size = check_tensors(x, group_size, tensors)
    running = running_statistics(running_mean, running_covariance)
    check_whitening(eps, method, iterations)
    check_momentum(momentum)
    if training:
        check_sample_count(x)
        with full_precision(x):
            rows, mean = _center(x, size)
            sigma = whitening_gradient.covariance(rows)
            y = _apply(rows, sigma, weight, bias, eps, method, iterations)
        if running is not None:
            _update(running, mean, sigma, samples_per_channel(x), momentum, num_batches_tracked)
    elif running is not None:
        mean, sigma = running
        wide = x.to(torch.promote_types(statistics_dtype(x.dtype), mean.dtype))
        with full_precision(x):
            rows = reference.grouped(wide - per_channel(mean, x.ndim), size)
            y = _apply(rows, sigma.double(), weight, bias, eps, method, iterations)
    else:
        raise ValueError("training=False whitens with running statistics: give running_mean and running_covariance")
    return _like(reference.ungrouped(y, x.shape), x)


@torch.no_grad()
def update_whitening_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_covariance: Tensor,
    momentum: float | None = 0.1,
    *,
    group_size: int | None = None,
    num_batches_tracked: Tensor | None = None,
) -> None:
    """Let the running statistics take in a batch, in place, without whitening anything.

    running ← (1 - momentum) · running + momentum · (μ, n/(n-1) Σ)

    The arguments, shapes and errors are those of `whiten`.

    >>> import torch
    >>> from batchlab.functional import update_whitening_statistics
    >>> mean, sigma = torch.zeros(2), torch.eye(2, dtype=torch.float64)[None]
    >>> update_whitening_statistics(torch.tensor([[1.0, 5.0], [3.0, 1.0]]), mean, sigma, momentum=1.0)
    >>> mean.tolist(), sigma.tolist()
    ([2.0, 3.0], [[[2.0, -4.0], [-4.0, 8.0]]])
    """
    size = check_tensors(x, group_size, {"running_mean": running_mean, "running_covariance": running_covariance})
    check_momentum(momentum)
    check_sample_count(x)
    with full_precision(x):
        rows, mean = _center(x, size)
        sigma = reference.covariance(rows)
    _update((running_mean, running_covariance), mean, sigma, samples_per_channel(x), momentum, num_batches_tracked)
