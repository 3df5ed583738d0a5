"""Training-mode batch normalization with residual and activation on the GPU, in Triton; raw tensors, no gradients.

A training step is six of them (`batchlab.kernels.batch_norm_cuda` makes operations of these):

    statistics = moments(x)                       one reading of x
    numbers = settle(*statistics, ...)            the table (3, C) that all others read; moves the running statistics
    y = apply(x, numbers, ...)                    activation((x - mean) / √(var + eps) · weight + bias + residual)
    sums = gradient_sums(grad, x, numbers, ...)   Σ g and Σ g · (x - mean), g the gradient behind the activation
    settle_gradients(sums, numbers, count)        gradients of weight and bias, and factors for the input's
    input_gradient(grad, x, numbers, factors)     gradients of x and residual

The table's rows are those of the CPU's kernels: the mean, rounded; what its rounding lost / √(var + eps); 1/√(var +
eps). Nothing waits for the device and no shape depends on data, so all of it can be captured in a CUDA graph, after one
call outside (which compiles and tunes).

Results have the same bits in every run and on every device of a kind: the tiles of a sum, and hence its order, follow
from the shapes. Only kernels in which each result depends on one position alone are tuned by measuring.

Import this module only where it is needed: it imports triton, which the library does without.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import triton
from torch import Tensor

from batchlab.kernels import batch_norm_triton_affine as affine
from batchlab.kernels import batch_norm_triton_moments as moment
from batchlab.kernels import batch_norm_triton_settle as once
from batchlab.kernels.batch_norm_triton_plan import dense, like, merge_blocks, next_power_of_two, plan

__all__ = [
    "INTERPRETED",
    "apply",
    "gradient_sums",
    "input_gradient",
    "moments",
    "serves",
    "settle",
    "settle_gradients",
]

INTERPRETED: Final[bool] = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 was set: kernels run in Python, slowly, on the CPU's tensors, for tests."""

DTYPES: Final = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

WARPS: Final = (2, 4, 8)
"""Tried for kernels without a sum: a tile is 32, 16 or 8 numbers a thread."""

VECTOR: Final = 128
"""Channels of a program that has nothing but vectors of channels to read: one a thread."""


def _tuned(kernel: Any) -> Any:
    """The kernel with the number of warps that was fastest for its layout and rounded size; kept on disk."""
    if INTERPRETED:
        return kernel
    configurations = [triton.Config({}, num_warps=warps) for warps in WARPS]
    key = ["size", "ROWS", "BLOCK_C", "BLOCK_S", "ACTIVATION"]
    return triton.autotune(configs=configurations, key=key, cache_results=True)(kernel)


_apply: Final = _tuned(affine.apply)
_input_gradient: Final = _tuned(affine.input_gradient)


def serves(x: Tensor) -> bool:
    """Whether the kernels take `x`: on the GPU (or interpreted), with a channel dimension, of a dtype they know."""
    return x.ndim >= 2 and x.dtype in DTYPES and (x.is_cpu if INTERPRETED else x.is_cuda)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def moments(x: Tensor) -> Tensor:
    """Return statistics (3, C): the mean, rounded; what the rounding lost; and the biased variance.

    Zeros if x is empty. The variance is NaN in a channel with NaN or inf, and inf where squares are beyond float32.
    """
    dtype = _statistics_dtype(x)
    if x.numel() == 0:
        return x.new_zeros((3, x.shape[1]), dtype=dtype)
    x = dense(x)
    reading = plan(x, sums=True)
    statistics = x.new_empty((3, reading.channels), dtype=dtype)
    whole = reading.splits == 1
    out = statistics if whole else x.new_empty((4, reading.splits, reading.channels), dtype=dtype)
    with torch.cuda.device_of(x):
        moment.moments[(reading.blocks * reading.splits,)](x, out, splits=reading.splits, WHOLE=whole, **reading.walk)
        if not whole:
            blocks = merge_blocks(reading)
            grid = (-(-reading.channels // blocks["BLOCK_C"]),)
            count = x.numel() // reading.channels
            moment.merge_moments[grid](out, statistics, reading.splits, count, reading.channels, **blocks)
    return statistics


def settle(
    mean: Tensor,
    lost: Tensor | None,
    variance: Tensor,
    eps: float,
    dtype: torch.dtype,
    running: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    momentum: float = 0.0,
    correction: float = 1.0,
) -> Tensor:
    """Return the table of numbers (3, C) in `dtype`, and move the running statistics in place, in the same launch.

    Args:
        mean: of each channel, in float32 or float64.
        lost: what its rounding lost, or None.
        variance: biased.
        eps: added to the variance.
        dtype: the results': float32, or float64 for such an x.
        running: mean, variance and number of batches to move, each or none.
        momentum: weight of this batch in the running statistics.
        correction: n / (n - 1), of the running variance.
    """
    channels = mean.numel()
    numbers = mean.new_empty((3, channels), dtype=dtype)
    if channels == 0:
        return numbers
    with torch.cuda.device_of(mean):
        once.settle[(-(-channels // VECTOR),)](
            mean, lost, variance, numbers, *running, channels, eps, momentum, correction, BLOCK_C=VECTOR
        )
    return numbers


def apply(
    x: Tensor,
    numbers: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return activation((x - mean) · scale + shift + residual), in the dtype and memory format of x.

    `weight` and `bias` are vectors of channels in the table's dtype; None is 1 and 0.
    """
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    reading = plan(x, sums=False)
    with torch.cuda.device_of(x):
        _apply[(reading.blocks * reading.splits,)](
            x,
            y,
            like(residual, x),
            numbers,
            weight,
            bias,
            size=next_power_of_two(x.numel()),
            ACTIVATION=activation,
            **reading.walk,
        )
    return y


def _deciding(
    activation: str | None, output: Tensor | None, residual: Tensor | None, x: Tensor
) -> dict[str, Tensor | None]:
    """What the activation's derivative needs beside x: its output where that is enough, or the residual, or nothing."""
    if output is not None and activation in ("relu", "leaky_relu", "sigmoid"):
        return {"output": like(output, x), "residual": None}
    return {"output": None, "residual": None if activation is None else like(residual, x)}


def gradient_sums(
    grad: Tensor,
    x: Tensor,
    numbers: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    output: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return (2, C): Σ g and Σ g · (x - rounded mean), with g = grad · activation'(pre). Zeros if x is empty.

    `pre` is computed again from x (and `residual`), unless `output` is given and tells the derivative.
    """
    if x.numel() == 0:
        return x.new_zeros((2, x.shape[1]), dtype=numbers.dtype)
    x = dense(x)
    reading = plan(x, sums=True)
    sums = x.new_empty((2, reading.channels), dtype=numbers.dtype)
    out = sums if reading.splits == 1 else x.new_empty((2, reading.splits, reading.channels), dtype=numbers.dtype)
    with torch.cuda.device_of(x):
        affine.gradient_sums[(reading.blocks * reading.splits,)](
            like(grad, x),
            x,
            **_deciding(activation, output, residual, x),
            numbers=numbers,
            weight=weight,
            bias=bias,
            out=out,
            splits=reading.splits,
            ACTIVATION=activation,
            **reading.walk,
        )
        if reading.splits > 1:
            blocks = merge_blocks(reading)
            grid = (-(-reading.channels // blocks["BLOCK_C"]), 2)
            affine.merge_sums[grid](out, sums, reading.splits, reading.channels, **blocks)
    return sums


def settle_gradients(sums: Tensor, numbers: Tensor, count: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of weight and bias, and the factors (2, C) for `input_gradient`, from those sums.

    `count` is how many values the statistics are of, infinity if they were given: there are no factors then. Sums may
    be of all ranks, in float64.
    """
    channels = sums.shape[1]
    of_weight, of_bias = numbers.new_empty(channels), numbers.new_empty(channels)
    factors = None if math.isinf(count) else numbers.new_empty((2, channels))
    if channels > 0:
        with torch.cuda.device_of(sums):
            once.settle_gradients[(-(-channels // VECTOR),)](
                sums, numbers, of_weight, of_bias, factors, channels, float(count), BLOCK_C=VECTOR
            )
    return of_weight, of_bias, factors


def input_gradient(
    grad: Tensor,
    x: Tensor,
    numbers: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Tensor | None,
    activation: str | None,
    output: Tensor | None = None,
    residual: Tensor | None = None,
    want_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and, if wanted, of the residual (None without activation: that is `grad` itself).

    weight / √(var + eps) · (g - mean(g) - (x - mean) / (var + eps) · mean(g · (x - mean))), the means being in the
    `factors`; without these, weight / √(var + eps) · g.
    """
    x = dense(x)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if want_residual and activation is not None else None
    if x.numel() == 0:
        return grad_x, grad_residual
    reading = plan(x, sums=False)
    with torch.cuda.device_of(x):
        _input_gradient[(reading.blocks * reading.splits,)](
            like(grad, x),
            x,
            **_deciding(activation, output, residual, x),
            numbers=numbers,
            weight=weight,
            bias=bias,
            factors=factors,
            grad_x=grad_x,
            grad_residual=grad_residual,
            size=next_power_of_two(x.numel()),
            ACTIVATION=activation,
            **reading.walk,
        )
    return grad_x, grad_residual
