"""Mean-only batch normalization layers (Salimans & Kingma 2016, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchlab import functional
from batchlab.nn.partial_batch_norm import PartialBatchNorm

__all__ = ["MeanOnlyBatchNorm1d", "MeanOnlyBatchNorm2d", "MeanOnlyBatchNorm3d"]


class _MeanOnlyBatchNorm(PartialBatchNorm):
    """What the three layers share; the arguments are explained at `MeanOnlyBatchNorm1d`."""

    statistics_buffers = ("running_mean",)

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        nonfinite: str = "propagate",
    ) -> None:
        learned = ("bias",) if affine else ()
        super().__init__(num_features, 0.0, learned, momentum, track_running_stats, device, dtype, nonfinite)

    def normalize(self, x: Tensor, running: Tensor | None, batches: Tensor | None, training: bool) -> Tensor:
        """Call the function with this layer's state; what is None is not moved."""
        return functional.mean_only_batch_norm(
            x, running, self.bias, training, self.momentum, nonfinite=self.nonfinite, num_batches_tracked=batches
        )


class MeanOnlyBatchNorm1d(_MeanOnlyBatchNorm):
    """Centering alone over (N, C) or (N, C, L): what batch normalization does to means, without its noise in the scale.

    training:    y = x - μ + bias,  running_mean ← (1 - momentum) · running_mean + momentum · μ
    evaluation:  y = x - running_mean + bias

    Made for layers with weight normalization, which holds the scale without looking at the data. A layer's own bias in
    front of it has no effect.

    State-dict keys are the part of torch's that exists: bias, running_mean, num_batches_tracked. `statistics` and
    `update_statistics` are the switches of `BatchNorm1d`; statistics are float32 or wider. Not a subclass of torch's
    layer, for it has no variance.

    Shapes:
        input, output: (N, C) or (N, C, L), any floating dtype.

    Args:
        num_features: C.
        momentum: weight of the new batch in the running mean; None: the plain average over all batches.
        affine: learn the bias (starts at 0).
        track_running_stats: keep a running mean; without it evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of the bias; statistics are never narrower than float32.
        nonfinite: what an inf or NaN in a batch does to the running mean: "propagate" (as torch), "skip" the affected
            channels, or "raise".

    Raises:
        ValueError: an unknown option; in forward, a shape that does not fit, or one value per channel, of which nothing
            would be left.

    Source: Salimans & Kingma 2016, section 3.2.

    >>> import torch
    >>> layer = MeanOnlyBatchNorm1d(1)
    >>> layer(torch.tensor([[1.0], [5.0]])).flatten().tolist()
    [-2.0, 2.0]
    >>> sorted(layer.state_dict())
    ['bias', 'num_batches_tracked', 'running_mean']
    """

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class MeanOnlyBatchNorm2d(_MeanOnlyBatchNorm):
    """Centering alone over (N, C, H, W); see `MeanOnlyBatchNorm1d` for everything else.

    >>> import torch
    >>> MeanOnlyBatchNorm2d(3)(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 3, 5, 5])
    """

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class MeanOnlyBatchNorm3d(_MeanOnlyBatchNorm):
    """Centering alone over (N, C, D, H, W); see `MeanOnlyBatchNorm1d` for everything else.

    >>> import torch
    >>> MeanOnlyBatchNorm3d(3)(torch.randn(2, 3, 2, 5, 5)).shape
    torch.Size([2, 3, 2, 5, 5])
    """

    _check_input_dim = nn.BatchNorm3d._check_input_dim
