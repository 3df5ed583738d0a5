"""Variance-only batch normalization layers: the rescaling of Ioffe & Szegedy 2015 without the centering."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchlab import functional
from batchlab.nn.partial_batch_norm import PartialBatchNorm

__all__ = ["VarianceOnlyBatchNorm1d", "VarianceOnlyBatchNorm2d", "VarianceOnlyBatchNorm3d"]


class _VarianceOnlyBatchNorm(PartialBatchNorm):
    """What the three layers share; the arguments are explained at `VarianceOnlyBatchNorm1d`."""

    statistics_buffers = ("running_var",)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        nonfinite: str = "propagate",
    ) -> None:
        learned = ("weight", "bias") if affine else ()
        super().__init__(num_features, 1.0, learned, momentum, track_running_stats, device, dtype, nonfinite)
        self.eps = eps

    def normalize(self, x: Tensor, running: Tensor | None, batches: Tensor | None, training: bool) -> Tensor:
        """Call the function with this layer's state; what is None is not moved."""
        return functional.variance_only_batch_norm(
            x,
            running,
            self.weight,
            self.bias,
            training,
            self.momentum,
            self.eps,
            nonfinite=self.nonfinite,
            num_batches_tracked=batches,
        )


class VarianceOnlyBatchNorm1d(_VarianceOnlyBatchNorm):
    """Rescaling alone over (N, C) or (N, C, L): each channel divided by its standard deviation, its mean with it.

    training:    y = weight · x / √(σ² + eps) + bias,  σ² of the batch, about its mean
                 running_var ← (1 - momentum) · running_var + momentum · n/(n-1) σ²
    evaluation:  y = weight · x / √(running_var + eps) + bias

    For telling apart what batch normalization's two steps contribute. σ² is the variance about the mean, so that
    exactly one step is left out: after `MeanOnlyBatchNorm1d(affine=False)` this is `BatchNorm1d`. (The mean of x²
    would be another method: it shrinks with the mean what has one.) The gradient goes through σ².

    State-dict keys are the part of torch's that exists: weight, bias, running_var, num_batches_tracked. `statistics`
    and `update_statistics` are the switches of `BatchNorm1d`; statistics are float32 or wider. Not a subclass of
    torch's layer, for it has no mean.

    Shapes:
        input, output: (N, C) or (N, C, L), any floating dtype.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running variance; None: the plain average over all batches.
        affine: learn weight (starts at 1) and bias (starts at 0).
        track_running_stats: keep a running variance; without it evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of parameters; statistics are never narrower than float32.
        nonfinite: what an inf or NaN in a batch does to the running variance: "propagate" (as torch), "skip" the
            affected channels, or "raise".

    Raises:
        ValueError: an unknown option; in forward, a shape that does not fit, or one value per channel.

    Source: Ioffe & Szegedy 2015, Algorithm 1, with μ left out of line 3.

    >>> import torch
    >>> layer = VarianceOnlyBatchNorm1d(1, eps=0.0)
    >>> layer(torch.tensor([[1.0], [5.0]])).flatten().tolist()
    [0.5, 2.5]
    >>> sorted(layer.state_dict())
    ['bias', 'num_batches_tracked', 'running_var', 'weight']
    """

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class VarianceOnlyBatchNorm2d(_VarianceOnlyBatchNorm):
    """Rescaling alone over (N, C, H, W); see `VarianceOnlyBatchNorm1d` for everything else.

    >>> import torch
    >>> VarianceOnlyBatchNorm2d(3)(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 3, 5, 5])
    """

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class VarianceOnlyBatchNorm3d(_VarianceOnlyBatchNorm):
    """Rescaling alone over (N, C, D, H, W); see `VarianceOnlyBatchNorm1d` for everything else.

    >>> import torch
    >>> VarianceOnlyBatchNorm3d(3)(torch.randn(2, 3, 2, 5, 5)).shape
    torch.Size([2, 3, 2, 5, 5])
    """

    _check_input_dim = nn.BatchNorm3d._check_input_dim
