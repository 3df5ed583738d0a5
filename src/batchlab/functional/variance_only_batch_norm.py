"""Variance-only batch normalization as a function: rescaling without centering."""

from __future__ import annotations

import torch
from torch import Tensor

from batchlab.functional.batch_norm_checks import check_input, check_sample_count
from batchlab.functional.batch_norm_training import samples_per_channel
from batchlab.functional.running_statistics import check_momentum, check_nonfinite, move_in_place
from batchlab.reference import variance_only_batch_norm as reference

__all__ = ["variance_only_batch_norm"]


def variance_only_batch_norm(
    x: Tensor,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    nonfinite: str = "propagate",
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Divide each channel by its standard deviation over the batch; the mean stays, divided with it.

    training:      y = weight · x / √(σ² + eps) + bias,  σ² about the batch's mean, with 1/n
                   running_var ← (1 - momentum) · running_var + momentum · n/(n-1) σ², in place
    not training:  y = weight · x / √(running_var + eps) + bias

    Arguments, shapes and errors are those of `batch_norm`, without what belongs to the mean.

    >>> import torch
    >>> from batchlab.functional import variance_only_batch_norm
    >>> var = torch.ones(1)
    >>> variance_only_batch_norm(torch.tensor([[1.0], [5.0]]), var, training=True, eps=0.0).flatten(), var
    (tensor([0.5000, 2.5000]), tensor([1.7000]))
    """
    check_input(x, {"running_var": running_var, "weight": weight, "bias": bias})
    check_nonfinite(nonfinite)
    check_momentum(momentum)
    if not training:
        if running_var is None:
            raise ValueError("training=False divides by the running variance's root: give running_var")
        wide = running_var.to(torch.promote_types(x.dtype, running_var.dtype))
        return reference.rescale(x, wide, weight, bias, eps).to(x.dtype)
    check_sample_count(x, None, None)
    y, var = reference.variance_only_batch_norm(x, weight, bias, eps)
    if running_var is not None:
        statistics = [(running_var, var.detach())]
        move_in_place(statistics, samples_per_channel(x), momentum, num_batches_tracked, nonfinite)
    return y.to(x.dtype)
