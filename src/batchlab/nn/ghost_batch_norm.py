"""Ghost batch normalization layers (Hoffer, Hubara & Soudry 2017, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchlab import functional
from batchlab.functional.ghost_batch_norm import check_group_size
from batchlab.nn.batch_norm_variant import BatchNormVariant

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]


class _GhostBatchNorm(BatchNormVariant):
    """What the three layers share; the arguments are explained at `GhostBatchNorm1d`."""

    def __init__(
        self,
        num_features: int,
        group_size: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        nonfinite: str = "propagate",
    ) -> None:
        check_group_size(group_size)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, nonfinite=nonfinite)
        self.group_size = group_size

    def normalize_batch(self, x: Tensor, update: bool) -> Tensor:
        """Normalize each group of samples with its own statistics."""
        return functional.ghost_batch_norm(
            x,
            self.running_mean if update else None,
            self.running_var if update else None,
            self.weight,
            self.bias,
            True,
            self.momentum,
            self.eps,
            group_size=self.group_size,
            nonfinite=self.nonfinite,
            num_batches_tracked=self.num_batches_tracked if update else None,
        )

    def extra_repr(self) -> str:
        """Torch's line with the group size behind the number of features."""
        features, rest = super().extra_repr().split(", ", 1)
        return f"{features}, group_size={self.group_size}, {rest}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """Batch normalization over (N, C) or (N, C, L) in groups of samples: a large batch, the statistics of small ones.

    training:    y_i = weight · (x_i - μ_g) / √(σ_g² + eps) + bias,  g = i // group_size, the group of sample i
                 running ← (1 - momentum) · running + momentum · (μ, n/(n-1) σ²) of the whole batch
    evaluation:  batch normalization with the running statistics

    Any batch size will do. A remainder of fewer than `group_size` samples is a group of its own; one with a single
    value per channel, which cannot be normalized, joins the last full group.

    The running statistics pool the groups: they are those of the batch, with the variance between the groups, the
    numbers that plain batch normalization would keep. So evaluation does not depend on `group_size`, and outputs keep
    the mean 0 and variance 1 that they have in training, also where groups differ (sorted data, one domain each).
    Averages of the groups' variances, as batches of `group_size` would leave them, are too small by the variance
    between groups there; for shuffled samples both estimate the same number.

    Parameters, buffers and state-dict keys are torch's; loading is strict both ways. `statistics` and
    `update_statistics` are the switches of `BatchNorm1d`; statistics are float32 or wider.

    Shapes:
        input, output: (N, C) or (N, C, L), any floating dtype.

    Args:
        num_features: C.
        group_size: samples per group; at least the batch size is batch normalization, 1 instance normalization.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; None: the plain average over all batches.
        affine: learn weight (starts at 1) and bias (starts at 0).
        track_running_stats: keep running statistics; without them evaluation normalizes groups too.
        device: of parameters and buffers.
        dtype: of parameters; statistics are never narrower than float32.
        nonfinite: what an inf or NaN in a batch does to the running statistics: "propagate" (as torch), "skip" the
            affected channels, or "raise".

    Raises:
        ValueError: an unknown option; in forward, a shape that does not fit, or groups with one value per channel.

    Source: Hoffer, Hubara & Soudry 2017, Algorithm 1.

    >>> import torch
    >>> layer = GhostBatchNorm1d(1, group_size=2)
    >>> x = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
    >>> layer(x).round(decimals=3).flatten().tolist()
    [-1.0, 1.0, -1.0, 1.0]
    >>> layer
    GhostBatchNorm1d(1, group_size=2, eps=1e-05, ...)
    """


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """Ghost batch normalization over (N, C, H, W); see `GhostBatchNorm1d` for everything else.

    >>> import torch
    >>> GhostBatchNorm2d(3, group_size=4)(torch.randn(10, 3, 5, 5)).shape
    torch.Size([10, 3, 5, 5])
    """


class GhostBatchNorm3d(_GhostBatchNorm, nn.BatchNorm3d):
    """Ghost batch normalization over (N, C, D, H, W); see `GhostBatchNorm1d` for everything else.

    >>> import torch
    >>> GhostBatchNorm3d(3, group_size=4)(torch.randn(10, 3, 2, 5, 5)).shape
    torch.Size([10, 3, 2, 5, 5])
    """
