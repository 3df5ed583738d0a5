"""Batch normalization, residual and activation in one kernel; gradients of gradients go through the formula."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchlab.functional.activation import gradient_from_input, gradient_from_output
from batchlab.functional.running_statistics import update_in_place
from batchlab.kernels import batch_norm as kernel
from batchlab.reference import batch_norm as reference

__all__ = [
    "asks_for_kernel",
    "evaluate_directly",
    "evaluate_fused",
    "is_plain",
    "is_transformed",
    "normalize_and_measure",
    "normalize_and_update",
    "normalize_fused",
    "of_channels",
    "serves",
    "train_directly",
]

ACTIVATIONS: Final = {number: name for name, number in kernel.ACTIVATIONS.items()}


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode derivatives are at work: they see through plain operations alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def asks_for_kernel(backend: str, x: Tensor) -> bool:
    """Whether this backend is the kernel, for tensors where `x` is: "auto" is on the CPU alone."""
    return backend == "fused" or (backend == "auto" and x.is_cpu)


def _beside(other: Tensor, x: Tensor) -> bool:
    """Whether both are on one device, without making objects of devices on the CPU."""
    return other.is_cpu if x.is_cpu else other.device == x.device


def serves(x: Tensor, residual: Tensor | None) -> bool:
    """Whether a kernel takes this input: on the CPU or a GPU, not empty, not transformed, not to be exported."""
    return (
        (x.is_cpu or x.is_cuda)
        and x.dtype in kernel.DTYPES
        and (residual is None or (residual.dtype == x.dtype and _beside(residual, x)))
        and x.numel() > 0
        and type(x) in (Tensor, torch.nn.Parameter)
        and not is_transformed()
        and not torch.compiler.is_exporting()  # who loads the model may not have the kernel
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and (kernel.available() if x.is_cpu else kernel.available_on_cuda())
    )


@torch.library.impl("batchlab_batch_norm::differentiable_backward", "CompositeImplicitAutograd", lib=kernel.LIBRARY)
def _differentiable_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual by plain operations on all they depend on: right at any order."""
    dtype = x.dtype
    wide, name = gradient.to(reference.statistics_dtype(dtype)), ACTIVATIONS[activation]
    if statistics is None:
        x = reference.center(x)[0]  # a constant shift changes nothing but digits
        group = reference.moments(x)
        mean, var = group.mean, reference.variance(group)
    else:
        mean, var = statistics.unbind()
    if output is not None:
        wide = gradient_from_output(wide, output.to(wide.dtype), name)
    elif name is not None:
        pre = reference.normalize(x, mean, var, weight, bias, eps)
        pre = pre if residual is None else pre + residual.to(pre.dtype)
        wide = gradient_from_input(wide, pre, name)
    if statistics is None:
        grads = reference.backward(wide, x, weight, eps)
    else:
        grads = reference.backward_given(wide, x, mean, var, weight, eps)
    return (grads[0].to(dtype), *grads[1:], wide.to(dtype))


def of_channels(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A vector of channels as the kernel reads it."""
    if values is None or (values.dtype == dtype and values.is_contiguous()):
        return values
    return values.to(dtype).contiguous()


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
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return kernel.forward(
        x if kernel.is_dense(x) else x.contiguous(),
        of_channels(weight, dtype),
        of_channels(bias, dtype),
        residual,
        *running,
        eps,
        kernel.ACTIVATIONS[activation],
    )


def normalize_and_measure(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the batch's mean, what its rounding lost, and the unbiased variance (0 of a single value)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    var = x.new_zeros(x.shape[1], dtype=dtype)  # a running variance of which nothing remains
    y, numbers = normalize_fused(x, weight, bias, eps, activation, residual, (None, var, None, 1.0))
    mean, rest, inverse = numbers.unbind()
    return y, mean, torch.where(rest == 0, 0, rest / inverse), var


def is_plain(running: Tensor, x: Tensor) -> bool:
    """Whether the kernel that takes `x` reads and moves this running statistic."""
    return (
        running.dtype in (torch.float32, torch.float64)
        and _beside(running, x)
        and running.is_contiguous()
        and not running.requires_grad
    )


def _counts(batches: Tensor | None, x: Tensor) -> bool:
    """Whether the kernel that takes `x` increments this number of batches; torch's layers have it in int64."""
    return batches is None or (batches.dtype == torch.int64 and _beside(batches, x))


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
    plain = is_plain(running_mean, x) and is_plain(running_var, x) and _counts(num_batches_tracked, x)
    if plain and momentum is not None and nonfinite == "propagate":
        running = running_mean, running_var, num_batches_tracked, momentum
        return normalize_fused(x, weight, bias, eps, activation, residual, running)[0]
    y, mean, _, var = normalize_and_measure(x, weight, bias, eps, activation, residual)
    count = x.numel() // x.shape[1]
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
    """The output with given statistics, which are constants."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return kernel.evaluate(
        x if kernel.is_dense(x) else x.contiguous(),
        mean,
        var,
        of_channels(weight, dtype),
        of_channels(bias, dtype),
        residual,
        eps,
        kernel.ACTIVATIONS[activation],
    )[0]


def _at_once(x: Tensor) -> bool:
    return (
        x.is_cpu
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and kernel.available()
    )


def train_directly(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> Tensor | None:
    """The usual call in training, without the checks in Python, which take as long as a small batch itself.

    The operation looks at everything before it changes anything. None: it does not take this call, or something is
    wrong with it; the long way takes it then, or says what.
    """
    if running_mean is None or running_var is None or momentum is None or not 0 <= momentum <= 1:
        return None
    if not _at_once(x) or x.ndim < 2 or x.numel() <= x.shape[1] or activation not in kernel.ACTIVATIONS:
        return None
    if running_mean.requires_grad or running_var.requires_grad:
        return None
    running = running_mean, running_var, num_batches_tracked, momentum
    try:
        return kernel.forward(x, weight, bias, residual, *running, eps, kernel.ACTIVATIONS[activation])[0]
    except RuntimeError:
        return None


def evaluate_directly(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor | None:
    """The usual call in evaluation; None as in `train_directly`."""
    if mean is None or var is None or mean.requires_grad or var.requires_grad or activation not in kernel.ACTIVATIONS:
        return None
    if not _at_once(x) or x.ndim < 2 or x.numel() == 0:
        return None
    try:
        return kernel.evaluate(x, mean, var, weight, bias, residual, eps, kernel.ACTIVATIONS[activation])[0]
    except RuntimeError:
        return None
