"""Ghost batch normalization in formulas (Hoffer, Hubara & Soudry 2017, Algorithm 1): small batches in a large one."""

import torch
from torch import Tensor

from batchlab.reference.batch_norm import Moments, merge_moments, moments, normalize, variance

__all__ = ["ghost_batch_norm", "group_sizes"]


def group_sizes(samples: int, group_size: int, values_per_sample: int = 1) -> list[int]:
    """How many samples each group has: `group_size`, then what remains as a group of its own.

    A remainder with a single value per channel has no variance, and joins the last full group instead.

    >>> group_sizes(10, 4), group_sizes(9, 4), group_sizes(9, 4, values_per_sample=49), group_sizes(3, 4)
    ([4, 4, 2], [4, 5], [4, 4, 1], [3])
    """
    full, rest = samples // group_size, samples % group_size  # divmod is not for compiled batch sizes
    if full == 0 or rest == 0:
        return [group_size] * full or [rest]
    if rest * values_per_sample == 1:
        return [group_size] * (full - 1) + [group_size + 1]
    return [group_size] * full + [rest]


def ghost_batch_norm(
    x: Tensor, group_size: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Moments]:
    """Normalize consecutive groups of samples, each by its own statistics; returns all samples' moments too.

    y_i = weight · (x_i - μ_g) / √(σ_g² + eps) + bias,  with g the group of sample i

    Shapes:
        x: (N, C, ...); weight, bias: (C,). The output has x's shape, in the statistics' dtype.

    >>> y, whole = ghost_batch_norm(torch.tensor([[1.0], [3.0], [10.0], [30.0]]), group_size=2, eps=0.0)
    >>> y.flatten().tolist(), whole.mean.item()
    ([-1.0, 1.0, -1.0, 1.0], 11.0)
    """
    values = x.shape[2:].numel()
    outputs, whole = [], moments(x[:0])
    for part in x.split(group_sizes(x.shape[0], group_size, values)):
        group = moments(part)
        outputs.append(normalize(part, group.mean, variance(group), weight, bias, eps))
        whole = merge_moments(whole, group)
    return torch.cat(outputs), whole
