"""Batch renormalization in formulas (Ioffe 2017, Algorithm 1): batch statistics, corrected towards the running ones."""

import torch
from torch import Tensor

from batchlab.reference.batch_norm import moments, normalize, per_channel, variance

__all__ = ["batch_renorm", "correction", "limits"]


def correction(
    mean: Tensor,
    std: Tensor,
    running_mean: Tensor,
    running_std: Tensor,
    r_max: float | Tensor,
    d_max: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return r and d, constants for the gradient.

    r = clip(std / running_std, 1/r_max, r_max),  d = clip((mean - running_mean) / running_std, -d_max, d_max)

    Unclipped, (x - mean)/std · r + d = (x - running_mean)/running_std, what evaluation computes.

    >>> one = torch.ones(1)
    >>> correction(4 * one, 6 * one, 2 * one, 2 * one, r_max=4.0, d_max=0.5)
    (tensor([3.]), tensor([0.5000]))
    """
    ratio, shift = std / running_std, (mean - running_mean) / running_std
    most, furthest = (torch.as_tensor(limit, dtype=ratio.dtype, device=ratio.device) for limit in (r_max, d_max))
    # Made constants at the end: a compiled backward pass would compute them again from limits that have moved.
    return ratio.clamp(1 / most, most).detach(), shift.clamp(-furthest, furthest).detach()


def limits(
    steps: Tensor, r_max: float, d_max: float, warmup_steps: int, r_max_steps: int, d_max_steps: int
) -> tuple[Tensor, Tensor]:
    """Return what r and d are clipped to after `steps` batches: 1 and 0 in the warm-up, then linearly up to the limits.

    >>> for step in (4999, 5000, 15000, 25000, 40000):
    ...     print([value.item() for value in limits(torch.tensor(step), 3.0, 5.0, 5000, 40000, 25000)])
    [1.0, 0.0]
    [1.0, 0.0]
    [1.571..., 2.5]
    [2.142..., 5.0]
    [3.0, 5.0]
    """
    since = (steps - warmup_steps).to(torch.float32)

    def risen(end: int) -> Tensor:
        # A rise of no length is a jump: at `warmup_steps` the limit is there.
        return (since / (end - warmup_steps)).clamp(0, 1) if end > warmup_steps else (since >= 0).to(since.dtype)

    return 1 + (r_max - 1) * risen(r_max_steps), d_max * risen(d_max_steps)


def batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
) -> Tensor:
    """Normalize with the batch's statistics, then correct towards the running ones.

    y = weight · ((x - μ)/s · r + d) + bias,  s = √(σ² + eps), r and d from `correction` with √(running_var + eps)

    Shapes:
        x: (N, C, ...); running_mean, running_var, weight, bias: (C,). Returns x's shape, in the statistics' dtype.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> batch_renorm(x, torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0).flatten()    # as evaluation: (x - 1) / 2
    tensor([0., 1.])
    """
    group = moments(x)
    std = (variance(group) + eps).sqrt()
    ratio, shift = correction(group.mean, std, running_mean, (running_var + eps).sqrt(), r_max, d_max)
    y = normalize(x, group.mean, variance(group), None, None, eps) * per_channel(ratio, x.ndim)
    y = y + per_channel(shift, x.ndim)
    if weight is not None:
        y = y * per_channel(weight.to(y.dtype), x.ndim)
    return y if bias is None else y + per_channel(bias.to(y.dtype), x.ndim)
