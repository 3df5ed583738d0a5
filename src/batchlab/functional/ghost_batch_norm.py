"""Ghost batch normalization as a function: all groups of a batch in one call of batch normalization."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchlab.functional.batch_norm import batch_norm
from batchlab.functional.batch_norm_checks import check_input, check_running, check_sample_count
from batchlab.functional.batch_norm_fused import normalize_and_measure
from batchlab.functional.batch_norm_training import choose_backend, normalize_batch, samples_per_channel
from batchlab.functional.running_statistics import check_momentum, check_nonfinite, update_in_place
from batchlab.reference.batch_norm import Moments, center, unbiased_variance
from batchlab.reference.ghost_batch_norm import group_sizes

__all__ = ["check_group_size", "ghost_batch_norm"]


class _Groups(NamedTuple):
    """Normalized groups of one size: the output, and per group (G, C) an offset, the mean minus it, and M2."""

    output: Tensor
    offset: Tensor
    mean: Tensor
    m2: Tensor
    size: Tensor


def check_group_size(group_size: int) -> None:
    """Raise ValueError unless `group_size` is a whole number from 1."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size is {group_size!r}; it is how many samples are normalized together: 1, 2, ...")


def _check_group_values(x: Tensor, group_size: int) -> None:
    if group_size == 1 and x.shape[0] > 1 and x.shape[2:].numel() == 1:
        raise ValueError(
            f"group_size=1 leaves one value per channel in each group of x, of shape {tuple(x.shape)}; "
            "give at least 2 (1 is instance normalization, for inputs with spatial dimensions)"
        )


def _normalize(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> _Groups:
    """Normalize `groups` groups of one size: each group's channels become channels of one batch normalization."""
    channels = x.shape[1]
    folded = x
    if groups > 1:
        folded = x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
        weight, bias = (None if values is None else values.repeat(groups) for values in (weight, bias))
    size = samples_per_channel(folded)
    # Offset and remainder of the mean apart keep the digits of their differences.
    backend = choose_backend("auto", x, None, None)
    if backend == "fused":
        y, offset, mean, var = normalize_and_measure(folded, weight, bias, eps)
        m2 = var * (size - 1)
    else:
        shifted, offset = center(folded)  # here, for the offset, and not by the backend
        y, mean, var, _ = normalize_batch(
            shifted,
            weight,
            bias,
            eps,
            activation=None,
            residual=None,
            mask=None,
            backend="aten" if backend == "shifted_aten" else backend,
        )
        m2 = var * max(size - 1, 0)
    if groups > 1:
        y = y.unflatten(1, (groups, channels)).transpose(0, 1).flatten(0, 1)
    offset, mean, m2 = (value.view(groups, channels) for value in (offset, mean, m2))
    return _Groups(y, offset, mean, m2, mean.new_full((groups, 1), size))


def _pool(parts: list[_Groups]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all samples: `merge_moments` for many groups at once."""
    offset, mean, m2, size = (torch.cat(values) for values in list(zip(*parts, strict=True))[1:])
    count = size.sum()
    # Differences of offsets are exact where they are close; sums of offset and mean would round away their digits.
    relative = (offset - offset[0]) + mean
    center_of_all = (relative * size).sum(0) / count.clamp(min=1)
    between = ((relative - center_of_all).square() * size).sum(0)
    whole = Moments(count, offset[0] + center_of_all, m2.sum(0) + between)
    return whole.mean, unbiased_variance(whole)


def _as_laid_out(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the memory format of `x`."""
    format_of = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if format_of is None or x.is_contiguous() or not x.is_contiguous(memory_format=format_of):
        return y
    return y.contiguous(memory_format=format_of)


def ghost_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    group_size: int = 32,
    nonfinite: str = "propagate",
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Normalize consecutive groups of samples, each by its own statistics.

    training:      y_i = weight · (x_i - μ_g) / √(σ_g² + eps) + bias,  g the group of sample i
                   running ← (1 - momentum) · running + momentum · (μ, n/(n-1) σ²) of the whole batch, in place
    not training:  batch normalization with the running statistics

    A remainder of fewer than `group_size` samples is a group of its own; one with a single value per channel joins the
    last full group. The other arguments, shapes and errors are those of `batch_norm`.

    Args:
        x: (N, C, ...), any floating dtype.
        running_mean: moving average of the means, or None with `training=True`.
        running_var: moving average of the unbiased variances, or None with `training=True`.
        weight: (C,); None is 1.
        bias: (C,); None is 0.
        training: normalize groups.
        momentum: weight of the new batch in the running statistics; None: the plain average.
        eps: added to the variance.
        group_size: samples per group; at least the batch size is batch normalization, 1 instance normalization.
        nonfinite: what an inf or NaN does to the running statistics: "propagate", "skip" or "raise".
        num_batches_tracked: integer scalar tensor, incremented in place by each batch that counts.

    Raises:
        ValueError: what `batch_norm` refuses, or groups with one value per channel.
        TypeError: x is not floating-point.

    Source: Hoffer, Hubara & Soudry 2017, Algorithm 1.

    >>> import torch
    >>> from batchlab.functional import ghost_batch_norm
    >>> x = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
    >>> ghost_batch_norm(x, None, None, training=True, group_size=2).round(decimals=3).flatten().tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """
    check_group_size(group_size)
    if not training:
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps, nonfinite=nonfinite)
    check_input(x, {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias})
    check_running(running_mean, running_var)
    check_nonfinite(nonfinite)
    check_momentum(momentum)
    check_sample_count(x, None, None)
    _check_group_values(x, group_size)
    sizes = group_sizes(x.shape[0], group_size, x.shape[2:].numel())
    equal = sizes.count(sizes[0])
    split = equal * sizes[0]
    parts = [_normalize(x[:split] if equal < len(sizes) else x, equal, weight, bias, eps)]
    if equal < len(sizes):
        parts.append(_normalize(x[split:], 1, weight, bias, eps))
    y = parts[0].output if len(parts) == 1 else torch.cat([part.output for part in parts])
    if running_mean is not None and running_var is not None:
        mean, var = _pool(parts)
        count = samples_per_channel(x)
        update_in_place(running_mean, running_var, mean, var, count, momentum, num_batches_tracked, nonfinite)
    return _as_laid_out(y.to(x.dtype), x)
