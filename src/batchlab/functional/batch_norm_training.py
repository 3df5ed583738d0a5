"""The backends of training-mode batch normalization: one contract, a dict, and the choice that "auto" makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab.functional.activation import activate
from batchlab.functional.batch_norm_fused import asks_for_kernel, is_transformed, serves
from batchlab.reference import batch_norm as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BACKENDS", "Normalized", "batch_statistics", "choose_backend", "finish", "normalize_batch"]

BACKENDS: Final = ("auto", "reference", "aten", "fused")


class Normalized(NamedTuple):
    """What a backend returns: the output and the batch's statistics, detached, for the running ones."""

    output: Tensor
    mean: Tensor
    unbiased_var: Tensor
    count: int | Tensor  # type: ignore[assignment]  # a field, not tuple.count


def finish(
    y: Tensor, dtype: torch.dtype, residual: Tensor | None, activation: str | None, mask: Tensor | None
) -> Tensor:
    """Add the residual, activate, zero the padding, and return to the input's dtype."""
    if residual is not None:
        # Padding may hold NaN; without this its gradient would reach the residual as 0 * NaN.
        y = y + (residual if mask is None else torch.where(mask, residual, 0))
    y = activate(y, activation)
    return (y if mask is None else torch.where(mask, y, 0)).to(dtype)


def batch_statistics(x: Tensor, mask: Tensor | None) -> tuple[Tensor, reference.Moments, Tensor]:
    """The shifted input, its moments relative to the offset, and the offset."""
    shifted, offset = reference.center(x, mask)
    return shifted, reference.moments(shifted, mask), offset


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, mask: Tensor | None) -> Normalized:
    shifted, group, offset = batch_statistics(x, mask)
    y = reference.normalize(shifted, group.mean, reference.variance(group), weight, bias, eps)
    # Without a mask the count is known from the shape; as a number it needs no tensor operations later.
    count = samples_per_channel(x) if mask is None else group.count.detach()
    return Normalized(y, (group.mean + offset).detach(), reference.unbiased_variance(group).detach(), count)


class _AtenBatchNorm(torch.autograd.Function):
    """Torch's fused operation; its gradient's gradient (of any order) goes through the reference formula.

    torch's own double backward takes the saved mean and variance for constants when differentiated once more, so third
    order gradients are silently wrong there.
    """

    # `forward` with ctx, not `setup_context`: the latter binds arguments by inspection, 20 µs a call on small batches.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # With momentum 1 the "running" statistics are the batch's own: the mean and, to full precision, the unbiased
        # variance, which the saved 1/√(var + eps) does not give back.
        mean, var = torch.zeros(2, x.shape[1], dtype=reference.statistics_dtype(x.dtype), device=x.device).unbind()
        y, saved_mean, saved_inverse = torch.native_batch_norm(x, weight, bias, mean, var, True, 1.0, eps)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, weight, saved_mean, saved_inverse)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True
            grads = reference.backward(grad_output, x, weight, ctx.eps)
        else:
            wanted = [needs_x, needs_weight, needs_bias]
            grads = torch.ops.aten.native_batch_norm_backward(
                grad_output, x, weight, None, None, mean, inverse, True, ctx.eps, wanted
            )
        return (
            grads[0] if needs_x else None,
            grads[1].to(weight.dtype) if needs_weight else None,
            grads[2].to(grads[2].dtype if weight is None else weight.dtype) if needs_bias else None,
            None,
        )


def _apply_aten(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normalized:
    dtype = reference.statistics_dtype(x.dtype)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    y, mean, var = _AtenBatchNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return Normalized(y, mean, var, samples_per_channel(x))


def _shifted_aten(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normalized:
    """Torch's operation on an input shifted by its mean: the same function, without the loss of digits at mean/std."""
    shifted, offset = reference.center(x)
    y, mean, var, count = _apply_aten(shifted, weight, bias, eps)
    return Normalized(y, mean + offset, var, count)


_UNMASKED: Final[dict[str, Callable[[Tensor, Tensor | None, Tensor | None, float], Normalized]]] = {
    "aten": _apply_aten,
    "shifted_aten": _shifted_aten,
}


def samples_per_channel(x: Tensor) -> int:
    """How many values of `x` each channel (dimension 1) has."""
    return x.numel() // max(x.shape[1], 1)


def choose_backend(
    backend: str,
    x: Tensor,
    mask: Tensor | None,
    process_group: ProcessGroup | None,
    residual: Tensor | None = None,
) -> str:
    """Return the implementation that `backend` means for this call.

    "auto" takes the fused kernel on the CPU, and elsewhere torch's operation on the input shifted by its mean:
    unshifted, its float32 error grows with mean/std (4e-4 for (N, C) inputs and 6e-3 for channels-last ones at
    mean/std 1e3). On a GPU the fused kernels, in Triton, are for who asks for them: nobody has measured them there yet.
    Masks, empty batches, `torch.func` and forward-mode derivatives are the reference's. Over ranks the choice is for
    what this one computes by itself, the kernel or the reference (see `batch_norm_ranks`). An explicit backend never
    falls back: what it cannot do is an error, save for an empty rank, whose error the other ranks would wait for.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed are {', '.join(map(repr, BACKENDS))}")
    if (backend in ("aten", "fused") and mask is not None) or (backend == "aten" and process_group is not None):
        given = "mask" if mask is not None else "process_group"
        raise ValueError(f"backend={backend!r} takes no {given}: use backend='auto' or 'reference'")
    if backend == "aten":
        return "aten"
    # Over ranks the kernels' gradient looks at values, where a compiler cannot follow.
    traced = process_group is not None and torch.compiler.is_compiling()
    fused = mask is None and asks_for_kernel(backend, x) and not traced and serves(x, residual)
    if backend == "fused" and not fused and (process_group is None or x.numel() > 0):
        raise ValueError(
            f"backend='fused' does not take this call (x: {x.dtype} on {x.device}, {x.numel()} numbers): it needs a "
            "compiled kernel (on a GPU Triton too), a tensor on the CPU or a GPU that is not empty, a residual of x's "
            "dtype and device, and no torch.export, torch.jit.trace, torch.func or forward-mode derivatives; use "
            "backend='auto'"
        )
    if fused:
        return "fused"
    plain = mask is None and process_group is None and x.numel() > 0 and not is_transformed()
    return "shifted_aten" if backend == "auto" and plain else "reference"


def normalize_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> Normalized:
    """Normalize with the batch's statistics, add the residual, activate; a fused kernel takes over this whole call."""
    chosen = choose_backend(backend, x, mask, None, residual)
    if chosen == "reference":
        result = _reference(x, weight, bias, eps, mask)
    else:
        result = _UNMASKED[chosen](x, weight, bias, eps)
    return result._replace(output=finish(result.output, x.dtype, residual, activation, mask))


def normalize_running(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> Tensor:
    """Normalize with given statistics, in the statistics' dtype (`backend="aten"`: torch's operation)."""
    dtype = torch.promote_types(x.dtype, mean.dtype)
    if backend == "aten":
        affine = [None if p is None else p.to(dtype) for p in (weight, bias)]
        return F.batch_norm(x.to(dtype), mean.to(dtype), var.to(dtype), affine[0], affine[1], False, 0.0, eps)
    return reference.normalize(x.to(dtype), mean.to(dtype), var.to(dtype), weight, bias, eps)
