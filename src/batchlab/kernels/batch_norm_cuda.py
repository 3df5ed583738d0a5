"""Batch norm's operations for tensors on the GPU, with exactly the CPU's signatures, by the kernels in Triton.

What is around them, autograd and the shapes for compilers, is the same for both devices. Launches: three or four
forward (statistics, in two parts where channels are split; the numbers and the running statistics; the output), and as
many backward. None waits for the device, and all of them can be captured in a CUDA graph.

Unlike the CPU's, sums are in float32 (for an x that is not float64): a variance beyond its largest number is infinite,
as torch's is.

Import this module only where there is a GPU, or for tests: it imports triton, which the library does without.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from batchlab.kernels import batch_norm_triton as triton_kernels
from batchlab.kernels.batch_norm_triton_plan import dense

__all__ = ["backward", "evaluate", "forward", "gradient_sums", "moments", "register"]

ACTIVATIONS: Final = (None, "relu", "leaky_relu", "silu", "sigmoid")
ROWS: Final = 3


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# A mistake must not read foreign memory.
def _check_input(x: Tensor) -> None:
    torch._check(x.ndim >= 2, lambda: "batch_norm: the input must have channels in dimension 1")
    torch._check(
        x.dtype in triton_kernels.DTYPES, lambda: f"batch_norm: there is no kernel for {x.dtype}; convert the input"
    )
    torch._check(dense(x) is x, lambda: "batch_norm: the input is neither contiguous nor channels-last")


def _check_channels(x: Tensor, values: Tensor | None, name: str, *dtypes: torch.dtype) -> None:
    if values is None:
        return
    torch._check(
        values.shape == x.shape[1:2]
        and values.dtype in dtypes
        and values.device == x.device
        and values.is_contiguous(),
        lambda: (
            f"batch_norm: {name} must be a contiguous vector of {x.shape[1]} channels in "
            f"{' or '.join(map(str, dtypes))} on {x.device}"
        ),
    )


def _check_like(x: Tensor, other: Tensor | None, name: str) -> None:
    if other is None:
        return
    torch._check(
        other.shape == x.shape and other.dtype == x.dtype and other.device == x.device,
        lambda: f"batch_norm: {name} must have the input's shape, dtype and device",
    )


def _check_table(x: Tensor, table: Tensor, rows: int, dtype: torch.dtype, name: str) -> None:
    torch._check(
        table.shape == (rows, x.shape[1])
        and table.dtype == dtype
        and table.device == x.device
        and table.is_contiguous(),
        lambda: f"batch_norm: {name} must be contiguous ({rows}, {x.shape[1]}) in {dtype} on {x.device}",
    )


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """The output and the numbers to save; see `batchlab.kernels.batch_norm.forward`."""
    _check_input(x)
    dtype = _wide(x)
    _check_channels(x, weight, "weight", dtype)
    _check_channels(x, bias, "bias", dtype)
    for running in (running_mean, running_var):
        _check_channels(x, running, "a running statistic", torch.float32, torch.float64)
    batches = num_batches_tracked
    torch._check(
        batches is None or (batches.numel() == 1 and batches.dtype == torch.int64 and batches.device == x.device),
        lambda: f"batch_norm: num_batches_tracked must be one int64 number on {x.device}",
    )
    _check_like(x, residual, "residual")
    if x.numel() == 0:
        return torch.empty_like(x), x.new_zeros((ROWS, x.shape[1]), dtype=dtype)
    mean, lost, variance = triton_kernels.moments(x).unbind()
    count = x.numel() // x.shape[1]
    moved = (running_mean, running_var, batches) if count >= 2 else (None, None, None)
    correction = count / max(count - 1, 1)
    saved = triton_kernels.settle(mean, lost, variance, eps, dtype, moved, momentum, correction)
    return triton_kernels.apply(x, saved, weight, bias, ACTIVATIONS[activation], residual), saved


def evaluate(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """The same with given statistics; see `batchlab.kernels.batch_norm.evaluate`."""
    _check_input(x)
    dtype = _wide(x)
    _check_channels(x, mean, "mean", torch.float32, torch.float64)
    _check_channels(x, variance, "variance", torch.float32, torch.float64)
    _check_channels(x, weight, "weight", dtype)
    _check_channels(x, bias, "bias", dtype)
    _check_like(x, residual, "residual")
    saved = triton_kernels.settle(mean, None, variance, eps, dtype)
    return triton_kernels.apply(x, saved, weight, bias, ACTIVATIONS[activation], residual), saved


def moments(x: Tensor) -> Tensor:
    """(2, C) in float64: mean and biased variance of each channel."""
    _check_input(x)
    mean, lost, variance = triton_kernels.moments(x).double().unbind()
    return torch.stack([mean + lost, variance])


def _check_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
) -> None:
    _check_input(x)
    _check_channels(x, weight, "weight", _wide(x))
    _check_channels(x, bias, "bias", _wide(x))
    _check_like(x, gradient, "gradient")
    _check_like(x, output, "output")
    _check_like(x, residual, "residual")
    _check_table(x, saved, ROWS, _wide(x), "saved")


def gradient_sums(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    activation: int,
) -> Tensor:
    """(2, C) in float64: Σ g and Σ g (x - rounded mean), with g the gradient in front of the activation."""
    _check_backward(gradient, x, weight, bias, output, residual, saved)
    return triton_kernels.gradient_sums(
        gradient, x, saved, weight, bias, ACTIVATIONS[activation], output, residual
    ).double()


def backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    sums: Tensor | None,
    count: float,
    activation: int,
    residual_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, residual, weight and bias; see `batchlab.kernels.batch_norm.backward`."""
    _check_backward(gradient, x, weight, bias, output, residual, saved)
    name = ACTIVATIONS[activation]
    if sums is None:
        sums = triton_kernels.gradient_sums(gradient, x, saved, weight, bias, name, output, residual)
    else:
        _check_table(x, sums, 2, torch.float64, "sums")
    if x.numel() == 0:
        of_weight, of_bias = saved.new_zeros((2, x.shape[1])).unbind()
        factors = None
    else:
        values = x.numel() // x.shape[1] if count == 0 else count
        of_weight, of_bias, factors = triton_kernels.settle_gradients(sums, saved, values)
    of_x, of_residual = triton_kernels.input_gradient(
        gradient, x, saved, weight, bias, factors, name, output, residual, want_residual=residual_needed
    )
    return of_x, saved.new_empty(0) if of_residual is None else of_residual, of_weight, of_bias


def register(library: torch.library.Library) -> None:
    """Make these the operations for tensors on the GPU."""
    operations = {
        "forward_": forward,
        "evaluate": evaluate,
        "moments": moments,
        "gradient_sums": gradient_sums,
        "backward": backward,
    }
    for name, operation in operations.items():
        library.impl(name, operation, "CUDA")
