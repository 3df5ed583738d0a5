"""Batch renormalization layers (Ioffe 2017, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchlab import functional
from batchlab.functional.batch_renorm import check_limits
from batchlab.nn.batch_norm_variant import BatchNormVariant
from batchlab.reference.batch_renorm import limits

__all__ = ["BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"]


class _BatchRenorm(BatchNormVariant):
    """What the three layers share; the arguments are explained at `BatchRenorm1d`."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 5000,
        r_max_steps: int = 40000,
        d_max_steps: int = 25000,
        nonfinite: str = "propagate",
    ) -> None:
        check_limits(r_max, d_max)
        if not 0 <= warmup_steps <= min(r_max_steps, d_max_steps):
            raise ValueError(
                f"warmup_steps={warmup_steps}, r_max_steps={r_max_steps}, d_max_steps={d_max_steps}: the limits rise "
                "from the end of the warm-up on, so 0 <= warmup_steps <= r_max_steps and d_max_steps"
            )
        if not track_running_stats:
            raise ValueError(
                "track_running_stats=False: batch renormalization corrects towards running statistics and needs them; "
                "BatchNorm1d to 3d are what remains without"
            )
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, nonfinite=nonfinite)
        self.r_max = r_max
        self.d_max = d_max
        self.warmup_steps = warmup_steps
        self.r_max_steps = r_max_steps
        self.d_max_steps = d_max_steps

    def limits(self) -> tuple[Tensor, Tensor]:
        """What r and d are clipped to in the next batch, by `num_batches_tracked`."""
        steps = self.num_batches_tracked
        if steps is None:
            raise ValueError("the layer has lost its num_batches_tracked, which says how far the limits have risen")
        return limits(steps, self.r_max, self.d_max, self.warmup_steps, self.r_max_steps, self.d_max_steps)

    def normalize_batch(self, x: Tensor, update: bool) -> Tensor:
        """Normalize with the batch's statistics, corrected towards the running ones."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            raise ValueError("batch renormalization needs running statistics, and this layer's were removed")
        r_max, d_max = self.limits()
        return functional.batch_renorm(
            x,
            mean,
            var,
            self.weight,
            self.bias,
            True,
            self.momentum,
            self.eps,
            r_max=r_max,
            d_max=d_max,
            update=update,
            nonfinite=self.nonfinite,
            num_batches_tracked=self.num_batches_tracked,
        )

    def extra_repr(self) -> str:
        """Torch's line with the limits and their schedule."""
        schedule = (
            f"r_max={self.r_max}, d_max={self.d_max}, warmup_steps={self.warmup_steps}, "
            f"r_max_steps={self.r_max_steps}, d_max_steps={self.d_max_steps}"
        )
        return f"{super().extra_repr()}, {schedule}"


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    """Batch normalization over (N, C) or (N, C, L) that trains on what it will evaluate; for small or uneven batches.

    training:    y = weight · ((x - μ)/s · r + d) + bias,  s = √(σ² + eps) of the batch
                 r = clip(s/S, 1/r_max, r_max),  d = clip((μ - running_mean)/S, ±d_max),  S = √(running_var + eps)
                 then running ← (1 - momentum) · running + momentum · (μ, n/(n-1) σ²)
    evaluation:  batch normalization with the running statistics

    r and d are constants for the gradient, which so still sees the normalization. Where nothing is clipped the output
    is that of evaluation. r and d use the running statistics from before the batch.

    The limits rise with `num_batches_tracked`: r_max = 1 and d_max = 0, plain batch normalization bit for bit, for
    `warmup_steps` batches; then linearly to `r_max` at `r_max_steps` and to `d_max` at `d_max_steps`. The counter is in
    the state dict, so training resumes where it was; a stock checkpoint brings its count along, and one without a
    counter starts at 0. With `update_statistics = False` the schedule stands still.

    Without a warm-up the first batches are corrected towards the initial statistics, mean 0 and variance 1, as far as
    the limits let them: give the running statistics a few times 1/momentum batches first.

    The paper averages the standard deviation; this keeps torch's running variance, so that checkpoints of torch's
    layers load both ways, strictly. `statistics` and `update_statistics` are the switches of `BatchNorm1d`.

    Shapes:
        input, output: (N, C) or (N, C, L), any floating dtype.

    Args:
        num_features: C.
        eps: added to the variances.
        momentum: weight of the new batch in the running statistics, the paper's 0.01 (torch's batch norm: 0.1), for the
            correction is towards a long average; None: the plain average over all batches.
        affine: learn weight (starts at 1) and bias (starts at 0).
        track_running_stats: there for torch's order of arguments; must be True.
        device: of parameters and buffers.
        dtype: of parameters; statistics are never narrower than float32.
        r_max: r stays in [1/r_max, r_max].
        d_max: d stays in [-d_max, d_max].
        warmup_steps: batches of plain batch normalization.
        r_max_steps: batches until `r_max` is reached.
        d_max_steps: batches until `d_max` is reached.
        nonfinite: what an inf or NaN in a batch does to the running statistics: "propagate" (as torch), "skip" the
            affected channels, or "raise".

    Raises:
        ValueError: an unknown option, limits or steps out of order; in forward, a shape that does not fit or a batch
            with one value per channel.

    Source: Ioffe 2017, Algorithm 1, and section 4 for the schedule.

    >>> import torch
    >>> layer = BatchRenorm1d(3, warmup_steps=0, r_max_steps=0, d_max_steps=0)
    >>> x = 0.5 * torch.randn(64, 3) + 2
    >>> expected = layer.eval()(x)
    >>> torch.allclose(layer.train()(x), expected, atol=1e-5)   # nothing is clipped
    True
    >>> layer.limits()
    (tensor(3.), tensor(5.))
    """


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    """Batch renormalization over (N, C, H, W); see `BatchRenorm1d` for everything else.

    >>> import torch
    >>> BatchRenorm2d(3)(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 3, 5, 5])
    """


class BatchRenorm3d(_BatchRenorm, nn.BatchNorm3d):
    """Batch renormalization over (N, C, D, H, W); see `BatchRenorm1d` for everything else.

    >>> import torch
    >>> BatchRenorm3d(3)(torch.randn(2, 3, 2, 5, 5)).shape
    torch.Size([2, 3, 2, 5, 5])
    """
