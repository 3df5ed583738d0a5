"""Batch normalization over the ranks of a process group: local sums by kernels or plain operations, one protocol.

Ranks wait for each other in every collective, and they may differ: one has an empty batch, on another no kernel could
be compiled, a third has a mask or another `backend`. So what a rank computes with must not show in its collectives:

- forward: one all-reduce of each rank's count, offset, mean and M2, (ranks, 3C + 1) in float64;
- backward: one all-reduce of ∂l/∂mean and ∂l/∂var, (2, C) in float64, if the input needs a gradient;
- gradients of gradients: those of `_by_formula`, which every rank runs then, whatever its kernels.

On every rank one node of autograd holds the whole call, activation and residual included. Two nodes on one rank and one
on another would have the same gradients, but not the same number of collectives in a loss that has a gradient in it.

The gradients of weight and bias are this rank's own sums, as those of all parameters are: DistributedDataParallel
averages them. The gradient of the input is that of the sum of all ranks' losses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from batchlab.functional.activation import gradient_from_input, gradient_from_output
from batchlab.functional.batch_norm_fused import of_channels
from batchlab.functional.batch_norm_training import Normalized, finish, samples_per_channel
from batchlab.functional.gather import pool_over_ranks, sum_over_ranks
from batchlab.kernels import batch_norm as kernel
from batchlab.reference import batch_norm as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["moments_over_ranks", "normalize_over_ranks"]


@torch.no_grad()
def moments_over_ranks(x: Tensor, mask: Tensor | None, group: ProcessGroup, fused: bool = False) -> reference.Moments:
    """Count, mean and M2 of all ranks' inputs together, in float64, the same bits on every rank; no gradient."""
    if fused:
        offset, var = kernel.moments(x).unbind()
        count = var.new_full((), samples_per_channel(x))
        local = reference.Moments(count, torch.zeros_like(offset), var * count)
    else:
        shifted, offset = reference.center(x, mask)
        if mask is None and x.numel() > 0:  # fewer passes, and a count beyond what a float32 holds
            dims = [dim for dim in range(x.ndim) if dim != 1]
            mean = shifted.mean(dims)  # what rounding has left
            m2 = shifted.sub_(reference.per_channel(mean, x.ndim)).square_().sum(dims)
            local = reference.Moments(offset.new_full((), samples_per_channel(x), dtype=torch.float64), mean, m2)
        else:
            local = reference.moments(shifted, mask)
    pivot, pooled = pool_over_ranks(local, offset, group)
    return pooled._replace(mean=pivot + pooled.mean)


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift each channel, in one pass."""
    return torch.addcmul(reference.per_channel(shift, x.ndim), x, reference.per_channel(scale, x.ndim))


def _from_statistics(
    of_mean: Tensor, of_var: Tensor, x: Tensor, mean: Tensor, count: Tensor, mask: Tensor | None
) -> Tensor:
    """What reaches the input through mean = Σ x / n and var = Σ (x - mean)² / n, from all ranks' gradients of these."""
    samples = count.clamp(min=1)
    shift, slope = (of_mean / samples).to(x.dtype), (2 * of_var / samples).to(x.dtype)
    found = _scaled(x, slope, shift - slope * mean)
    return found if mask is None else torch.where(mask, found, 0)


class _KnownStatistics(torch.autograd.Function):
    """Mean and variance of all ranks as functions of this rank's input, where their values are known already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, count: Tensor, mask: Tensor | None, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.group = group
        mean, var = mean.clone(), var.clone()
        ctx.save_for_backward(x, mean, count, mask)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, mean, count, mask = ctx.saved_tensors
        of_mean, of_var = sum_over_ranks(torch.stack(gradients), ctx.group).unbind()
        return _from_statistics(of_mean, of_var, x, mean, count, mask), None, None, None, None, None


class _Saved(NamedTuple):
    """What the backward pass reads; mean, variance and count are those of all ranks."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    output: Tensor | None  # it or the residual, where the gradient in front of the activation is found from one
    residual: Tensor | None
    mask: Tensor | None
    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # a field, not tuple.count
    numbers: Tensor | None  # the kernel's; None where plain operations computed the output


Gradients = tuple[Tensor | None, Tensor, Tensor, Tensor]  # of x, weight, bias and residual


def _shifted(x: Tensor, mean: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x` minus its rounded mean, and what the mean is beyond that, both in the statistics' dtype.

    The rest is so little that it need not be taken from each number: sums and shifts of all of them take it in.
    """
    dtype = reference.statistics_dtype(x.dtype)
    offset = mean.to(dtype)
    shifted = x.to(dtype) - reference.per_channel(offset, x.ndim)
    return (shifted if mask is None else torch.where(mask, shifted, 0)), (mean - offset).to(dtype)


def _scale(inverse: Tensor, weight: Tensor | None) -> Tensor:
    return inverse if weight is None else inverse * weight.to(inverse.dtype)


def _shift(scale: Tensor, mean: Tensor, bias: Tensor | None) -> Tensor:
    return -mean * scale if bias is None else bias.to(scale.dtype) - mean * scale


def _by_formula(
    gradient: Tensor, saved: _Saved, eps: float, activation: str | None, group: ProcessGroup, needs_x: bool
) -> Gradients:
    """Gradients by plain operations; with `create_graph=True` they depend on all ranks, and are right at any order."""
    x, mask = saved.x, saved.mask
    shifted, mean = _shifted(x, saved.mean, mask)
    var = saved.var.to(shifted.dtype)
    if torch.is_grad_enabled():
        mean, var = _KnownStatistics.apply(shifted, mean, var, saved.count, mask, group)  # type: ignore[no-untyped-call]
    inverse = 1 / (var + eps).sqrt()
    scale = _scale(inverse, saved.weight)
    g = gradient.to(shifted.dtype)
    g = g if mask is None else torch.where(mask, g, 0)
    if saved.output is not None:
        g = gradient_from_output(g, saved.output.to(g.dtype), activation)
    elif activation is not None:
        pre = _scaled(shifted, scale, _shift(scale, mean, saved.bias))
        pre = finish(pre, pre.dtype, saved.residual, None, mask)
        g = gradient_from_input(g, pre, activation)
    dims = [dim for dim in range(x.ndim) if dim != 1]
    total = g.sum(dims)
    product = (g * shifted).sum(dims) - mean * total
    of_x = None
    if needs_x:
        of_mean, of_var = _all_ranks(total, product, scale, inverse, group)
        through = _from_statistics(of_mean, of_var, shifted, mean, saved.count, mask)
        of_x = torch.addcmul(through, g, reference.per_channel(scale, x.ndim))
    return of_x, product * inverse, total, g


def _all_ranks(total: Tensor, product: Tensor, scale: Tensor, inverse: Tensor, group: ProcessGroup) -> Tensor:
    """∂l/∂mean and ∂l/∂var, (2, C), over all ranks, from this rank's Σ g and Σ g (x - mean)."""
    # These and not the sums themselves: each rank's come with its own weight, which need not be the same.
    own = torch.stack([-scale * total, -0.5 * scale * inverse.square() * product])
    return sum_over_ranks(own, group)


def _by_kernels(
    gradient: Tensor, saved: _Saved, numbers: Tensor, activation: int, group: ProcessGroup, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients by the kernels: a pass for this rank's sums, the all-reduce, a pass for the rest."""
    given = gradient, saved.x, saved.weight, saved.bias, saved.output, saved.residual, numbers, activation
    if not needs[0]:
        _, of_residual, of_weight, of_bias = kernel.backward(*given, count=torch.inf, residual_needed=needs[3])
        return None, of_weight, of_bias, gradient if activation == 0 else of_residual
    total, product = kernel.gradient_sums(*given).unbind()
    scale = _scale(numbers[2], saved.weight).to(torch.float64)  # rounded as the kernel's
    _, rest, inverse = numbers.to(torch.float64).unbind()
    lost = torch.where(rest == 0, 0, rest / inverse)
    product = product - lost * total  # the kernel's deviations are from the rounded mean
    of_statistics = _all_ranks(total, product, scale, inverse, group) / saved.count
    # The sums that the kernel would have needed of a single process for these gradients; its divisor is 1, then.
    factors = torch.stack([-of_statistics[0] / scale, -2 * of_statistics[1] / (scale * inverse.square())])
    factors = torch.where(scale == 0, 0, factors)
    one, two = factors[0], factors[1] + lost * factors[0]
    of_x, of_residual, _, _ = kernel.backward(*given, sums=torch.stack([one, two]), count=1.0, residual_needed=needs[3])
    # A weight of zero stops this rank's gradient, not what the others have given it another weight for.
    odd = (scale == 0) & (of_statistics != 0).any(0)
    if odd.any():
        shifted, mean = _shifted(saved.x, saved.mean, None)
        of_mean, of_var = of_statistics.unbind()
        through = _from_statistics(of_mean, of_var, shifted, mean, torch.ones_like(saved.count), None)
        of_x = torch.where(reference.per_channel(odd, of_x.ndim), through.to(of_x.dtype), of_x)
    return of_x, product * inverse, total, gradient if activation == 0 else of_residual


class _NormalizeOverRanks(torch.autograd.Function):
    """Normalize with the statistics of all ranks, add the residual, activate; gradients flow through the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        activation: str | None,
        group: ProcessGroup,
        fused: bool,
    ) -> Tensor:
        numbers = None
        if fused:
            y, numbers = kernel.evaluate(x, mean, var, weight, bias, residual, eps, kernel.ACTIVATIONS[activation])
        else:
            shifted, rest = _shifted(x, mean, mask)
            scale = _scale(1 / (var.to(rest.dtype) + eps).sqrt(), weight)
            y = finish(_scaled(shifted, scale, _shift(scale, rest, bias)), x.dtype, residual, activation, mask)
        ctx.eps, ctx.activation, ctx.group = eps, activation, group
        ctx.residual_dtype = None if residual is None else residual.dtype
        # What a sigmoid's gradient is found from shows in the gradient of that, so it is the same on every rank. A
        # (leaky) ReLU's needs signs alone, and plain operations do better not to compute the output again.
        behind = residual is not None and activation is not None
        signs = activation in ("relu", "leaky_relu") and not fused
        output = y if signs or (behind and activation != "silu") else None
        other = residual if behind and output is None else None
        ctx.save_for_backward(*_Saved(x, weight, bias, output, other, mask, mean, var, count, numbers))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        needs = ctx.needs_input_grad[:4]
        if saved.numbers is None or torch.is_grad_enabled():  # create_graph=True
            found = _by_formula(gradients[0], saved, ctx.eps, ctx.activation, ctx.group, needs[0])
        else:
            number = kernel.ACTIVATIONS[ctx.activation]
            found = _by_kernels(gradients[0], saved, saved.numbers, number, ctx.group, needs)
        of = (saved.x, saved.weight, saved.bias)
        dtypes = [*(None if values is None else values.dtype for values in of), ctx.residual_dtype]
        wanted = [
            gradient.to(dtype) if need and gradient is not None else None
            for gradient, dtype, need in zip(found, dtypes, needs, strict=True)
        ]
        return (*wanted, *([None] * 8))


def normalize_over_ranks(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
    group: ProcessGroup,
    fused: bool,
) -> Normalized:
    """Normalize with the statistics of all ranks, add the residual, activate.

    Args:
        x: this rank's input; it may be empty.
        weight: scale of each channel.
        bias: shift of each channel.
        eps: added to the variance.
        activation: name, or None.
        residual: added before the activation.
        mask: (N, 1, ...), True where an entry is valid.
        group: the ranks.
        fused: by kernels, on this rank.

    Returns:
        this rank's output, and the mean, unbiased variance and count of all ranks.
    """
    if fused:
        dtype = reference.statistics_dtype(x.dtype)
        x = x if kernel.is_dense(x) else x.contiguous()
        weight, bias = of_channels(weight, dtype), of_channels(bias, dtype)
    pooled = moments_over_ranks(x, mask, group, fused)
    count, mean, var = pooled.count, pooled.mean, reference.variance(pooled)
    y = _NormalizeOverRanks.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, residual, mask, mean, var, count, eps, activation, group, fused
    )
    return Normalized(y, mean, reference.unbiased_variance(pooled), count)
