"""Batch normalization, residual and activation in one kernel; gradients of gradients go through the formula."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from batchlab.functional.activation import gradient_from_input, gradient_from_output
from batchlab.functional.running_statistics import update_in_place
from batchlab.kernels import batch_norm as kernel
from batchlab.reference import batch_norm as reference

__all__ = ["evaluate_fused", "normalize_and_update", "normalize_fused", "serves"]

FROM_OUTPUT: Final = frozenset({"relu", "leaky_relu", "sigmoid"})
"""Activations whose derivative the output tells; of the others the residual is kept."""


def serves(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the kernel takes this input: on the CPU, not empty, and not under a compiler or `torch.func`."""
    return (
        x.device.type == "cpu"
        and x.dtype in kernel.DTYPES
        and (residual is None or (residual.dtype == x.dtype and residual.device.type == "cpu"))
        and x.numel() > 0
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and kernel.available()
    )


def _as(x: Tensor, other: Tensor) -> Tensor:
    """`other` in the layout of `x`."""
    return other if other.stride() == x.stride() else torch.empty_like(x).copy_(other)


class _FusedBatchNorm(torch.autograd.Function):
    # `forward` with ctx, not `setup_context`: the latter binds arguments by inspection, 20 µs a call on small batches.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: tuple[Tensor | None, Tensor | None, Tensor | None, float],
        eps: float,
        activation: str | None,
    ) -> tuple[Tensor, Tensor]:
        aligned = None if residual is None else _as(x, residual)
        mean, var, batches, momentum = running
        y, saved = kernel.forward(
            x, weight, bias, aligned, mean, var, batches, momentum, eps, kernel.ACTIVATIONS[activation]
        )
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.activation = eps, activation
        behind = residual is not None and activation is not None
        output = y if behind and activation in FROM_OUTPUT else None
        ctx.save_for_backward(x, weight, bias, saved, output, residual if behind and output is None else None)
        return y, saved

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 7
        x, weight, bias, saved, output, residual = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            grads = _differentiable(grad_output, x, weight, bias, output, residual, ctx.eps, ctx.activation)
        else:
            aligned = None if residual is None else _as(x, residual)
            kind = kernel.ACTIVATIONS[ctx.activation]
            gradient, grad_residual, parameters = kernel.backward(
                _as(x, grad_output), x, output, aligned, saved, kind, needs[3]
            )
            grads = gradient, parameters[0], parameters[1], grad_output if kind == 0 else grad_residual
        return (
            grads[0] if needs[0] else None,
            grads[1] if needs[1] else None,
            grads[2] if needs[2] else None,
            grads[3] if needs[3] else None,
            None,
            None,
            None,
        )


def _differentiable(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by plain operations on everything that they depend on: right at any order."""
    wide = gradient.to(reference.statistics_dtype(x.dtype))
    if output is not None:
        wide = gradient_from_output(wide, output.to(wide.dtype), activation)
    elif activation is not None:
        group = reference.moments(x)
        pre = reference.normalize(x, group.mean, reference.variance(group), weight, bias, eps)
        pre = pre if residual is None else pre + residual.to(pre.dtype)
        wide = gradient_from_input(wide, pre, activation)
    grad_x, grad_weight, grad_bias = reference.backward(wide, x, weight, eps)
    return grad_x, grad_weight, grad_bias, wide.to(x.dtype)


def _of_channels(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.to(dtype).contiguous()


def normalize_fused(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    running: tuple[Tensor | None, Tensor | None, Tensor | None, float] = (None, None, None, 0.0),
) -> tuple[Tensor, Tensor]:
    """The output, and the batch's numbers as `batchlab.kernels.batch_norm.forward` returns them.

    Args:
        x: an input that the kernel `serves`; copied if it is not dense.
        weight: scale of each channel.
        bias: shift of each channel.
        eps: added to the variance.
        activation: name, or None.
        residual: added before the activation.
        running: mean, variance and number of batches to update in place, and the weight of this batch.
    """
    dtype = reference.statistics_dtype(x.dtype)
    found: tuple[Tensor, Tensor] = _FusedBatchNorm.apply(  # type: ignore[no-untyped-call]
        x if kernel.is_dense(x) else x.contiguous(),
        _of_channels(weight, dtype),
        _of_channels(bias, dtype),
        residual,
        running,
        eps,
        activation,
    )
    return found


def _movable(running: Tensor) -> bool:
    return running.is_cpu and running.dtype in (torch.float32, torch.float64) and running.is_contiguous()


def normalize_and_update(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    nonfinite: str,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """Training in one kernel, which moves the running statistics too where a plain average is all there is to do."""
    if running_mean is None or running_var is None:
        return normalize_fused(x, weight, bias, eps, activation, residual)[0]
    if momentum is not None and nonfinite == "propagate" and _movable(running_mean) and _movable(running_var):
        running = running_mean, running_var, num_batches_tracked, momentum
        return normalize_fused(x, weight, bias, eps, activation, residual, running)[0]
    y, numbers = normalize_fused(x, weight, bias, eps, activation, residual)
    count = x.numel() // x.shape[1]
    mean, var = numbers[0] + numbers[1], numbers[5] * (count / (count - 1))
    update_in_place(running_mean, running_var, mean, var, count, momentum, num_batches_tracked, nonfinite)
    return y


def evaluate_fused(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """The output with given statistics, without a gradient."""
    dtype = reference.statistics_dtype(x.dtype)
    x = x if kernel.is_dense(x) else x.contiguous()
    vectors = [_of_channels(values, dtype) for values in (mean, var, weight, bias)]
    assert vectors[0] is not None
    assert vectors[1] is not None
    aligned = None if residual is None else _as(x, residual)
    return kernel.evaluate(
        x, vectors[0], vectors[1], vectors[2], vectors[3], aligned, eps, kernel.ACTIVATIONS[activation]
    )
