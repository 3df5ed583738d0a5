"""Batch normalization in formulas (Ioffe & Szegedy 2015, Algorithm 1 and section 3; Chan, Golub & LeVeque 1983).

Everything here is plain PyTorch: gradients of any order are autograd's own, and `backward` is the paper's derivation
written out. Channels are dimension 1; every other dimension is averaged over.

Statistics are accumulated in float32 or wider. No variance is ever computed as E[x²] - E[x]²: samples are first
centred on a value close to their mean, so a mean a thousand or a million times the standard deviation costs no digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Moments",
    "average",
    "backward",
    "backward_given",
    "center",
    "merge_moments",
    "moments",
    "normalize",
    "per_channel",
    "statistics_dtype",
    "unbiased_variance",
    "variance",
]


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of a group of samples, per channel.

    Attributes:
        count: number of samples behind each channel's mean, a scalar tensor.
        mean: (C,), the average; 0 where `count` is 0.
        m2: (C,), the sum over samples of (x - mean)².
    """

    count: Tensor  # type: ignore[assignment]  # a field, not tuple.count
    mean: Tensor
    m2: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that statistics of inputs of `dtype` have: float32 or wider.

    >>> statistics_dtype(torch.bfloat16), statistics_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def per_channel(values: Tensor, ndim: int) -> Tensor:
    """View (C,) so that it broadcasts over dimension 1 of an input with `ndim` dimensions."""
    return values if ndim == 2 else values.view([1, -1] + [1] * (ndim - 2))


def _reduced(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _sum_and_count(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the valid entries per channel, and how many there are (the same for every channel)."""
    if mask is None:
        count = torch.full((), x.numel() // max(x.shape[1], 1), dtype=x.dtype, device=x.device)
        return x.sum(_reduced(x)), count
    valid = mask.expand(x.shape[0], 1, *x.shape[2:])
    # `where`, not a product: padding may hold inf or NaN, and 0 * NaN is NaN.
    return torch.where(mask, x, 0).sum(_reduced(x)), valid.sum().to(x.dtype)


def center(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shift each channel by (nearly) its own mean, so that what follows keeps its digits.

    shifted = x - offset,  offset = mean over the valid entries, rounded and without gradient

    Batch normalization does not change when a constant is added to a channel, so `offset` needs no gradient; the
    mean's rounding error stays in `shifted` and is removed by whoever normalizes it. Padding becomes 0.

    Shapes:
        x: (N, C, ...); mask: None or bool, broadcastable to (N, 1, ...).
        returns: shifted, shaped as x, in `statistics_dtype(x.dtype)`; offset, (C,).

    >>> shifted, offset = center(torch.tensor([[1e6], [1e6 + 2]]))
    >>> shifted.flatten().tolist(), offset.item()
    ([-1.0, 1.0], 1000001.0)
    """
    x = x.to(statistics_dtype(x.dtype))
    if mask is None and x.numel() > 0:
        offset = x.detach().mean(_reduced(x))
        return x - per_channel(offset, x.ndim), offset
    total, count = _sum_and_count(x.detach(), mask)
    offset = total / count.clamp(min=1)
    shifted = x - per_channel(offset, x.ndim)
    return (shifted if mask is None else torch.where(mask, shifted, 0)), offset


def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Count, mean and M2 per channel, over the valid entries.

    mean = offset + 1/n Σ (x - offset),  M2 = Σ (x - mean)²,  with `offset` a first estimate of the mean

    Shapes:
        x: (N, C, ...); mask: None or bool, broadcastable to (N, 1, ...). An empty group has count, mean and M2 zero.

    >>> moments(torch.tensor([[1.0], [3.0]]))
    Moments(count=tensor(2.), mean=tensor([2.]), m2=tensor([2.]))
    """
    x = x.to(statistics_dtype(x.dtype))
    total, count = _sum_and_count(x, mask)
    samples = count.clamp(min=1)
    estimate = total / samples
    residue, _ = _sum_and_count(x - per_channel(estimate, x.ndim), mask)
    mean = estimate + residue / samples
    m2, _ = _sum_and_count((x - per_channel(mean, x.ndim)).square(), mask)
    return Moments(count, mean, m2)


def merge_moments(first: Moments, second: Moments) -> Moments:
    """Moments of the union of two groups (Chan, Golub & LeVeque 1983).

    n = n₁ + n₂,  δ = mean₂ - mean₁,  mean = mean₁ + δ n₂/n,  M2 = M2₁ + M2₂ + δ² n₁ n₂/n

    The last term is the variance between the groups: leaving it out is the usual mistake when statistics of
    micro-batches, ranks or ghost batches are averaged. Either group may be empty.

    >>> a, b = moments(torch.tensor([[1.0], [3.0]])), moments(torch.tensor([[8.0]]))
    >>> merge_moments(a, b) == moments(torch.tensor([[1.0], [3.0], [8.0]]))
    True
    """
    count = first.count + second.count
    share = second.count / count.clamp(min=1)
    delta = second.mean - first.mean
    return Moments(count, first.mean + delta * share, first.m2 + second.m2 + delta.square() * (first.count * share))


def variance(group: Moments) -> Tensor:
    """M2 / n, the biased variance that Algorithm 1 normalizes with; 0 for an empty group."""
    return group.m2 / group.count.clamp(min=1)


def unbiased_variance(group: Moments) -> Tensor:
    """M2 / (n - 1) = n/(n - 1) · variance, Algorithm 2 line 10, for inference; 0 for fewer than two samples."""
    return group.m2 / (group.count - 1).clamp(min=1)


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalize each channel with the given mean and variance, then scale and shift (Algorithm 1, the last two lines).

    y = weight · (x - mean) / √(var + eps) + bias

    Shapes:
        x: (N, C, ...); mean, var, weight, bias: (C,). Returns x's shape, in the statistics' dtype.

    >>> normalize(torch.tensor([[3.0]]), torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0).item()
    1.0
    """
    scale = 1 / (var + eps).sqrt()
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    # (x - mean) first: x · scale + (bias - mean · scale) needs one pass less and loses the digits of mean/std.
    y = (x.to(mean.dtype) - per_channel(mean, x.ndim)) * per_channel(scale, x.ndim)
    return y if bias is None else y + per_channel(bias.to(y.dtype), x.ndim)


def average(running: Tensor, new: Tensor, momentum: float | Tensor) -> Tensor:
    """Return the moving average after one more value: (1 - momentum) · running + momentum · new.

    `momentum` is the weight of the new value, as in torch; 1/k at the k-th value gives the plain average. Counted from
    the nearer end, as torch.lerp does: with momentum 1 it is the new value, however large the old one.

    >>> average(torch.tensor(0.0), torch.tensor(10.0), 0.1).item()
    1.0
    >>> average(torch.tensor(1e30), torch.tensor(10.0), 1.0).item()
    10.0
    """
    weight = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
    return torch.lerp(running, new.to(running.dtype), weight)


def backward(
    grad_output: Tensor, x: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `normalize(x, batch mean, batch variance, weight, bias)`, written out as in section 3.

    With g = ∂l/∂y, s = √(var + eps), x̂ = (x - mean) / s and m samples per channel:

    ∂l/∂x̂    = g · weight
    ∂l/∂var  = Σ ∂l/∂x̂ · (x - mean) · (-1/2) s⁻³
    ∂l/∂mean = -Σ ∂l/∂x̂ / s          (the paper's second term is Σ (x - mean) = 0)
    ∂l/∂x    = ∂l/∂x̂ / s + ∂l/∂var · 2 (x - mean)/m + ∂l/∂mean / m
    ∂l/∂weight = Σ g · x̂,   ∂l/∂bias = Σ g

    Made of differentiable operations on `grad_output`, `x` and `weight`, so its own gradients are right at any order.

    Returns:
        gradients with respect to x (its dtype), weight and bias ((C,), the statistics' dtype).

    >>> x, g = torch.randn(8, 3), torch.randn(8, 3)
    >>> grad_x, _, _ = backward(g, x)
    >>> torch.allclose(grad_x.sum(0), torch.zeros(3), atol=1e-5)   # shifting x changes nothing
    True
    """
    group = moments(x)
    centered = x.to(group.mean.dtype) - per_channel(group.mean, x.ndim)
    g = grad_output.to(group.mean.dtype)
    count = group.count.clamp(min=1)
    inverse = 1 / (variance(group) + eps).sqrt()
    dims = _reduced(x)
    grad_normalized = g if weight is None else g * per_channel(weight.to(g.dtype), x.ndim)
    grad_var = (grad_normalized * centered).sum(dims) * -0.5 * inverse**3
    grad_mean = -grad_normalized.sum(dims) * inverse
    grad_x = (
        grad_normalized * per_channel(inverse, x.ndim)
        + centered * per_channel(grad_var * 2 / count, x.ndim)
        + per_channel(grad_mean / count, x.ndim)
    )
    grad_weight = (g * centered).sum(dims) * inverse
    return grad_x.to(x.dtype), grad_weight, g.sum(dims)


def backward_given(
    grad_output: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `normalize(x, mean, var, weight, bias)` where mean and variance are constants.

    ∂l/∂x = g · weight / √(var + eps),   ∂l/∂weight = Σ g · x̂,   ∂l/∂bias = Σ g

    Returns:
        what `backward` returns.

    >>> x, g = torch.randn(8, 1), torch.ones(8, 1)
    >>> backward_given(g, x, torch.zeros(1), torch.tensor([4.0]), eps=0.0)[0][0].item()
    0.5
    """
    inverse = 1 / (var + eps).sqrt()
    g = grad_output.to(inverse.dtype)
    normalized = (x.to(g.dtype) - per_channel(mean, x.ndim)) * per_channel(inverse, x.ndim)
    scale = inverse if weight is None else inverse * weight.to(g.dtype)
    dims = _reduced(x)
    grad_x = g * per_channel(scale, x.ndim)
    return grad_x.to(x.dtype), (g * normalized).sum(dims), g.sum(dims)
