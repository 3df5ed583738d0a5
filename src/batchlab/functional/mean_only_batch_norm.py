"""Mean-only batch normalization as a function (Salimans & Kingma 2016, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from batchlab.functional.batch_norm_checks import check_input, check_sample_count
from batchlab.functional.batch_norm_training import samples_per_channel
from batchlab.functional.running_statistics import check_momentum, check_nonfinite, move_in_place
from batchlab.reference import mean_only_batch_norm as reference
from batchlab.reference.batch_norm import per_channel

__all__ = ["mean_only_batch_norm"]


def mean_only_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    *,
    nonfinite: str = "propagate",
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Subtract each channel's mean over the batch, and add a bias.

    training:      y = x - μ + bias,  running_mean ← (1 - momentum) · running_mean + momentum · μ, in place
    not training:  y = x - running_mean + bias

    Arguments, shapes and errors are those of `batch_norm`, without what belongs to the variance. A single value per
    channel is refused, for its output would be the bias, whatever it is.

    >>> import torch
    >>> from batchlab.functional import mean_only_batch_norm
    >>> mean = torch.zeros(1)
    >>> mean_only_batch_norm(torch.tensor([[1.0], [5.0]]), mean, training=True, momentum=0.5).flatten(), mean
    (tensor([-2.,  2.]), tensor([1.5000]))
    """
    check_input(x, {"running_mean": running_mean, "bias": bias})
    check_nonfinite(nonfinite)
    check_momentum(momentum)
    if not training:
        if running_mean is None:
            raise ValueError("training=False subtracts the running mean: give running_mean")
        # In the wider dtype until the mean is off: a difference keeps what digits its terms have.
        dtype = torch.promote_types(x.dtype, running_mean.dtype)
        y = x.to(dtype) - per_channel(running_mean.to(dtype), x.ndim)
        return (y if bias is None else y + per_channel(bias.to(y.dtype), x.ndim)).to(x.dtype)
    check_sample_count(x, None, None)
    y, mean = reference.mean_only_batch_norm(x, bias)
    if running_mean is not None:
        statistics = [(running_mean, mean.detach())]
        move_in_place(statistics, samples_per_channel(x), momentum, num_batches_tracked, nonfinite)
    return y.to(x.dtype)
