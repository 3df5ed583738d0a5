"""Batch normalization as a function (Ioffe & Szegedy 2015, Algorithm 1), with what the layers need around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchlab.functional.activation import check_activation
from batchlab.functional.batch_norm_checks import (
    check_input,
    check_mask,
    check_residual,
    check_running,
    check_sample_count,
)
from batchlab.functional.batch_norm_fused import (
    asks_for_kernel,
    evaluate_directly,
    evaluate_fused,
    is_plain,
    normalize_and_update,
    serves,
    train_directly,
)
from batchlab.functional.batch_norm_ranks import moments_over_ranks, normalize_over_ranks
from batchlab.functional.batch_norm_training import (
    BACKENDS,
    batch_statistics,
    choose_backend,
    finish,
    normalize_batch,
    normalize_running,
    samples_per_channel,
)
from batchlab.functional.gather import check_process_group
from batchlab.functional.running_statistics import check_momentum, check_nonfinite, update_in_place
from batchlab.reference.batch_norm import unbiased_variance

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["batch_norm", "update_running_statistics"]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
    nonfinite: str = "propagate",
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Normalize each channel over the batch, scale, shift; then add a residual and activate.

    training:      y = act(weight · (x - μ) / √(σ² + eps) + bias + residual),  μ, σ² of this batch (σ² with 1/n)
                   running ← (1 - momentum) · running + momentum · (μ, n/(n-1) σ²), in place
    not training:  the same with the running statistics, which stay as they are

    The leading arguments are `torch.nn.functional.batch_norm`'s. Statistics are float32 or wider whatever x is, and
    exact where mean/std is large. Gradients flow through the batch statistics and are right at any order (except with
    `backend="aten"` in evaluation, which is torch's).

    Shapes:
        x, residual and the result: (N, C, ...), any floating dtype; the result has x's dtype and memory format.
        running_mean, running_var, weight, bias: (C,).
        mask: bool, broadcastable to (N, 1, ...).

    Args:
        x: the input.
        running_mean: moving average of the means, or None with `training=True`.
        running_var: moving average of the unbiased variances, or None with `training=True`.
        weight: γ of the paper; None is 1.
        bias: β of the paper; None is 0.
        training: normalize with the batch's own statistics.
        momentum: weight of the new batch in the running statistics, 0 to 1; None: the plain average over
            `num_batches_tracked` batches.
        eps: added to the variance.
        activation: None, "relu", "leaky_relu" (slope 0.01), "silu" or "sigmoid", applied last.
        residual: added before the activation.
        mask: True where an entry is valid. Statistics are over valid entries only, padded outputs are 0, and the
            values in the padding (NaN included) reach neither outputs nor gradients. Fewer than two valid entries
            update nothing.
        process_group: compute the statistics over all its ranks, weighted by their counts; ranks may be uneven or
            empty. Differentiable, on any backend with all_reduce. Every rank must take part in every forward and
            backward. None: this process alone.
        backend: "reference" (plain operations), "aten" (torch's own operation, with its rounding), "fused" (one
            kernel for all of it, on the CPU or a GPU), or "auto": the fastest that is exact and takes this call. Ranks
            may have different ones.
        nonfinite: what an inf or NaN in the batch statistics does to the running ones: "propagate" into them, "skip"
            the affected channels, or "raise" ValueError before anything changes (reads the values on the host).
        num_batches_tracked: integer scalar tensor, incremented in place by each batch that counts.

    Raises:
        ValueError: a shape does not fit, an option is unknown, the running statistics are missing, a batch has one
            value per channel, or `nonfinite="raise"` found some.
        TypeError: x is not floating-point, or mask is.

    Source: Ioffe & Szegedy 2015, Algorithm 1 and section 3.1.

    >>> import torch
    >>> from batchlab.functional import batch_norm
    >>> mean, var = torch.zeros(2), torch.ones(2)
    >>> y = batch_norm(torch.tensor([[1.0, 10.0], [3.0, 30.0]]), mean, var, training=True)
    >>> y.round(decimals=3).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> mean.tolist()
    [0.20000000298023224, 2.0]
    """
    if backend == "auto" and mask is None and process_group is None and nonfinite == "propagate":
        y = (
            train_directly(
                x, running_mean, running_var, weight, bias, momentum, eps, activation, residual, num_batches_tracked
            )
            if training
            else evaluate_directly(x, running_mean, running_var, weight, bias, eps, activation, residual)
        )
        if y is not None:
            return y
    check_input(x, {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias})
    check_running(running_mean, running_var)
    check_activation(activation)
    check_nonfinite(nonfinite)
    check_momentum(momentum)
    if residual is not None:
        check_residual(residual, x)
    valid = None if mask is None else check_mask(mask, x)

    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("training=False normalizes with running statistics: give running_mean and running_var")
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; allowed are {', '.join(map(repr, BACKENDS))}")
        constants = is_plain(running_mean, x) and is_plain(running_var, x)
        if backend == "fused":  # or says why not
            choose_backend(backend, x, valid, None, residual)
            if not constants:
                raise ValueError(
                    "backend='fused' in evaluation needs contiguous running statistics in float32 or float64 on x's "
                    "device, without a gradient; use backend='auto'"
                )
        if asks_for_kernel(backend, x) and valid is None and constants and serves(x, residual):
            return evaluate_fused(x, running_mean, running_var, weight, bias, eps, activation, residual)
        y = normalize_running(x, running_mean, running_var, weight, bias, eps, backend)
        return finish(y, x.dtype, residual, activation, valid)

    if process_group is not None:
        check_process_group(process_group)
    check_sample_count(x, valid, process_group)
    fused = choose_backend(backend, x, valid, process_group, residual) == "fused"
    if fused and process_group is None:
        return normalize_and_update(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            momentum,
            eps,
            activation,
            residual,
            nonfinite,
            num_batches_tracked,
        )
    if process_group is None:
        y, mean, var, count = normalize_batch(
            x, weight, bias, eps, activation=activation, residual=residual, mask=valid, backend=backend
        )
    else:
        y, mean, var, count = normalize_over_ranks(
            x,
            weight,
            bias,
            eps,
            activation=activation,
            residual=residual,
            mask=valid,
            group=process_group,
            fused=fused,
        )
    if running_mean is not None and running_var is not None:
        update_in_place(running_mean, running_var, mean, var, count, momentum, num_batches_tracked, nonfinite)
    return y


@torch.no_grad()
def update_running_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float | None = 0.1,
    *,
    mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    nonfinite: str = "propagate",
    num_batches_tracked: Tensor | None = None,
) -> None:
    """Let the running statistics take in a batch, in place, without normalizing anything.

    running ← (1 - momentum) · running + momentum · (μ, n/(n-1) σ²)

    The arguments, shapes and errors are those of `batch_norm`.

    >>> import torch
    >>> from batchlab.functional import update_running_statistics
    >>> mean, var = torch.zeros(1), torch.ones(1)
    >>> update_running_statistics(torch.tensor([[1.0], [3.0]]), mean, var, momentum=0.5)
    >>> mean.item(), var.item()
    (1.0, 1.5)
    """
    check_input(x, {"running_mean": running_mean, "running_var": running_var})
    check_nonfinite(nonfinite)
    check_momentum(momentum)
    if process_group is not None:
        check_process_group(process_group)
    valid = None if mask is None else check_mask(mask, x)
    check_sample_count(x, valid, process_group)
    if process_group is None:
        _, found, offset = batch_statistics(x, valid)
        found = found._replace(mean=found.mean + offset)
    else:
        found = moments_over_ranks(x, valid, process_group)
    count = samples_per_channel(x) if valid is None and process_group is None else found.count
    mean, var = found.mean, unbiased_variance(found)
    update_in_place(running_mean, running_var, mean, var, count, momentum, num_batches_tracked, nonfinite)
