"""Training-mode batch normalization with residual and activation on the GPU, in Triton; raw tensors, no gradients.

The same functions as the compiled ones for the CPU:

    statistics = moments(x)                           one reading of x
    y = apply(x, statistics, ...)                     activation((x - mean) / √(var + eps) · weight + bias + residual)
    sums = gradient_sums(grad, x, statistics, ...)    Σ g and Σ g · (x - mean), g the gradient behind the activation
    input_gradient(grad, x, statistics, sums, ...)    gradients of x and residual

Between the first two, and between the last two, ranks may merge what they found. Nothing waits for the device and no
shape depends on data, so all of it can be captured in a CUDA graph, after one call outside (which compiles and tunes).

Results have the same bits in every run and on every device of a kind: the tiles of a sum, and hence its order, follow
from the shapes. Only kernels in which each result depends on one position alone are tuned by measuring.

Import this module only where it is needed: it imports triton, which the library does without.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from batchlab.kernels import batch_norm_triton_affine as affine
from batchlab.kernels import batch_norm_triton_moments as moment
from batchlab.kernels.batch_norm_triton_plan import dense, like, merge_blocks, next_power_of_two, plan

__all__ = ["INTERPRETED", "apply", "gradient_sums", "input_gradient", "moments", "serves"]

INTERPRETED: Final[bool] = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 was set: kernels run in Python, slowly, on the CPU's tensors, for tests."""

DTYPES: Final = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

WARPS: Final = (2, 4, 8)
"""Tried for kernels without a sum: a tile is 32, 16 or 8 numbers a thread."""


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


def _vectors(statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor | None]:
    """The arguments per channel, without gaps: a weight may be one number, expanded."""
    return {
        "statistics": statistics.contiguous(),
        "weight": None if weight is None else weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
    }


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


def apply(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return activation((x - mean) / √(var + eps) · weight + bias + residual), in the dtype and memory format of x."""
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
            **_vectors(statistics, weight, bias),
            size=next_power_of_two(x.numel()),
            EPS=float(eps),
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
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    output: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return (2, C): Σ g and Σ g · (x - mean), with g = grad · activation'(pre). Zeros if x is empty.

    `pre` is computed again from x (and `residual`), unless `output` is given and tells the derivative.
    """
    if x.numel() == 0:
        return x.new_zeros((2, x.shape[1]), dtype=statistics.dtype)
    x = dense(x)
    reading = plan(x, sums=True)
    sums = x.new_empty((2, reading.channels), dtype=statistics.dtype)
    out = sums if reading.splits == 1 else x.new_empty((2, reading.splits, reading.channels), dtype=statistics.dtype)
    with torch.cuda.device_of(x):
        affine.gradient_sums[(reading.blocks * reading.splits,)](
            like(grad, x),
            x,
            **_deciding(activation, output, residual, x),
            **_vectors(statistics, weight, bias),
            out=out,
            splits=reading.splits,
            EPS=float(eps),
            ACTIVATION=activation,
            **reading.walk,
        )
        if reading.splits > 1:
            blocks = merge_blocks(reading)
            grid = (-(-reading.channels // blocks["BLOCK_C"]), 2)
            affine.merge_sums[grid](out, sums, reading.splits, reading.channels, **blocks)
    return sums


def input_gradient(
    grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    sums: Tensor,
    count: int | Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    output: Tensor | None = None,
    residual: Tensor | None = None,
    want_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and, if wanted, of the residual (None without activation: that is `grad` itself).

    weight / √(var + eps) · (g - mean(g) - (x - mean) / (var + eps) · mean(g · (x - mean))), the means being `sums` over
    `count` samples: of all ranks, and on the device if it is a tensor.
    """
    x = dense(x)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if want_residual and activation is not None else None
    if x.numel() == 0:
        return grad_x, grad_residual
    if isinstance(count, Tensor):
        sums, count = (sums / count).to(sums.dtype), 1
    reading = plan(x, sums=False)
    with torch.cuda.device_of(x):
        _input_gradient[(reading.blocks * reading.splits,)](
            like(grad, x),
            x,
            **_deciding(activation, output, residual, x),
            **_vectors(statistics, weight, bias),
            sums=sums.contiguous(),
            grad_x=grad_x,
            grad_residual=grad_residual,
            count=count,
            size=next_power_of_two(x.numel()),
            EPS=float(eps),
            ACTIVATION=activation,
            **reading.walk,
        )
    return grad_x, grad_residual
