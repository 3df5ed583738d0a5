"""Batch renormalization as a function: batch normalization whose weight and bias carry the correction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchlab.functional.batch_norm import batch_norm
from batchlab.functional.batch_norm_checks import check_input, check_running, check_sample_count
from batchlab.functional.batch_norm_fused import normalize_and_update
from batchlab.functional.batch_norm_training import choose_backend, normalize_batch
from batchlab.functional.running_statistics import check_momentum, check_nonfinite, update_in_place
from batchlab.reference.batch_norm import center
from batchlab.reference.batch_renorm import correction

__all__ = ["batch_renorm", "check_limits"]


def check_limits(r_max: float, d_max: float) -> None:
    """Raise ValueError unless r may be clipped to [1/r_max, r_max] and d to [-d_max, d_max]."""
    if not r_max >= 1 or math.isinf(r_max):
        raise ValueError(f"r_max is {r_max}; r is clipped to [1/r_max, r_max], so it is a number from 1 (no scaling)")
    if not d_max >= 0 or math.isinf(d_max):
        raise ValueError(f"d_max is {d_max}; d is clipped to [-d_max, d_max], so it is a number from 0 (no shift)")


def batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.01,
    eps: float = 1e-5,
    *,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
    update: bool = True,
    nonfinite: str = "propagate",
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Normalize with the batch's statistics, corrected towards the running ones.

    training:      y = weight · ((x - μ)/s · r + d) + bias,  s = √(σ² + eps), and without gradient
                   r = clip(s/S, 1/r_max, r_max),  d = clip((μ - running_mean)/S, ±d_max),  S = √(running_var + eps)
                   then running ← (1 - momentum) · running + momentum · (μ, n/(n-1) σ²), in place
    not training:  batch normalization with the running statistics

    Arguments that `batch_norm` has, shapes and errors are its.

    Args:
        x: (N, C, ...), any floating dtype.
        running_mean: moving average of the means; r and d are taken from it as it is before this batch.
        running_var: moving average of the unbiased variances, likewise.
        weight: (C,); None is 1.
        bias: (C,); None is 0.
        training: normalize with the batch's statistics.
        momentum: weight of the new batch in the running statistics; None: the plain average.
        eps: added to the variances.
        r_max: r stays in [1/r_max, r_max]; 1 with `d_max=0` is batch normalization, bit for bit. A scalar tensor is
            taken as it is.
        d_max: d stays in [-d_max, d_max].
        update: move the running statistics.
        nonfinite: what an inf or NaN does to the running statistics: "propagate", "skip" or "raise".
        num_batches_tracked: integer scalar tensor, incremented in place by each batch that counts.

    Raises:
        ValueError: what `batch_norm` refuses, r_max below 1, or d_max below 0.
        TypeError: x is not floating-point.

    Source: Ioffe 2017, Algorithm 1.

    >>> import torch
    >>> from batchlab.functional import batch_renorm
    >>> mean, var = torch.tensor([1.0]), torch.tensor([4.0])
    >>> batch_renorm(torch.tensor([[1.0], [3.0]]), mean, var, training=True).round(decimals=3).flatten()
    tensor([0., 1.])
    """
    if not isinstance(r_max, Tensor) and not isinstance(d_max, Tensor):
        check_limits(r_max, d_max)
    if not training:
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps, nonfinite=nonfinite)
    if running_mean is None or running_var is None:
        raise ValueError("batch renormalization corrects towards running statistics: give running_mean and running_var")
    check_input(x, {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias})
    check_running(running_mean, running_var)
    check_nonfinite(nonfinite)
    check_momentum(momentum)
    check_sample_count(x, None, None)
    if x.numel() == 0:
        return batch_norm(x, None, None, weight, bias, True, momentum, eps)
    shifted, offset = center(x)
    with torch.no_grad():
        dims = [dim for dim in range(x.ndim) if dim != 1]
        var, residue = torch.var_mean(shifted, dims, correction=0)
        # The offset's difference first: it is exact where the means are close.
        shift = (offset - running_mean) + residue
        std, running_std = (var + eps).sqrt(), (running_var.to(var.dtype) + eps).sqrt()
        ratio, shift = correction(shift, std, torch.zeros_like(shift), running_std, r_max, d_max)
    # y = (x - μ)/s · (r · weight) + (d · weight + bias): one batch normalization, with another weight and bias.
    scale = ratio if weight is None else ratio * weight.to(ratio.dtype)
    shift = shift if weight is None else shift * weight.to(shift.dtype)
    shift = shift if bias is None else shift + bias.to(shift.dtype)
    backend = choose_backend("auto", x, None, None)
    if backend == "fused":
        return normalize_and_update(
            x,
            running_mean if update else None,
            running_var if update else None,
            scale,
            shift,
            momentum,
            eps,
            None,
            None,
            nonfinite,
            num_batches_tracked,
        )
    y, mean, unbiased_var, count = normalize_batch(
        shifted,
        scale,
        shift,
        eps,
        activation=None,
        residual=None,
        mask=None,
        backend="aten" if backend == "shifted_aten" else backend,
    )
    if update:
        update_in_place(
            running_mean, running_var, mean + offset, unbiased_var, count, momentum, num_batches_tracked, nonfinite
        )
    return y.to(x.dtype)
