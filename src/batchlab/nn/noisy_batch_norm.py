"""Batch normalization with noise behind it, for one experiment (Santurkar et al. 2018, section 2.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from batchlab import functional
from batchlab.nn.batch_norm_variant import BatchNormVariant
from batchlab.reference.noisy_batch_norm import add_noise

__all__ = ["NoisyBatchNorm1d", "NoisyBatchNorm2d", "NoisyBatchNorm3d"]


class _NoisyBatchNorm(BatchNormVariant):
    """What the three layers share; the arguments are explained at `NoisyBatchNorm1d`."""

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
        mean_range: float = 0.5,
        std_range: float = 1.25,
        mean_spread: float = 0.1,
        std_spread: float = 0.1,
        nonfinite: str = "propagate",
    ) -> None:
        noise = {"mean_range": mean_range, "mean_spread": mean_spread, "std_spread": std_spread}
        for name, value in noise.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it is the width of a distribution: a number from 0 (no noise)")
        if not 1 <= std_range < math.inf:
            raise ValueError(f"std_range is {std_range}; scales are drawn from 1 to it: a number from 1 (no noise)")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, nonfinite=nonfinite)
        self.mean_range = mean_range
        self.std_range = std_range
        self.mean_spread = mean_spread
        self.std_spread = std_spread

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the input, channels in dimension 1; in training, add the noise."""
        y = super().forward(x)
        if not self.training:
            return y
        return add_noise(y, self.mean_range, self.std_range, self.mean_spread, self.std_spread).to(y.dtype)

    def normalize_batch(self, x: Tensor, update: bool) -> Tensor:
        """Normalize with the batch's own statistics."""
        return functional.batch_norm(
            x,
            self.running_mean if update else None,
            self.running_var if update else None,
            self.weight,
            self.bias,
            True,
            self.momentum,
            self.eps,
            nonfinite=self.nonfinite,
            num_batches_tracked=self.num_batches_tracked if update else None,
        )

    def extra_repr(self) -> str:
        """Torch's line with the noise."""
        return (
            f"{super().extra_repr()}, mean_range={self.mean_range}, std_range={self.std_range}, "
            f"mean_spread={self.mean_spread}, std_spread={self.std_spread}"
        )


class NoisyBatchNorm1d(_NoisyBatchNorm, nn.BatchNorm1d):
    """Batch normalization over (N, C) or (N, C, L) whose outputs are made to shift: for an experiment, not for use.

    training:    y_ij = s_ij · BN(x)_ij + m_ij      for sample i and activation j, a channel at one position
                 m_ij ~ U(μ_j - mean_spread, μ_j + mean_spread),  μ_j ~ U(-mean_range, mean_range)
                 s_ij ~ N(σ_j, std_spread²),                      σ_j ~ U(1, std_range)
    evaluation:  y = BN(x), with the running statistics

    μ_j and σ_j are drawn anew in every step, so what the next layer sees has a mean and a variance that jump. If batch
    normalization helped by holding these steady, a network with this layer should train no better than one without
    normalization. BN includes weight and bias; the noise is behind them, in training whatever `statistics` says.

    Noise comes from torch's default generator on the input's device: the same seed, the same noise. Parameters, buffers
    and state-dict keys are torch's; loading is strict both ways. The running statistics see no noise.

    Shapes:
        input, output: (N, C) or (N, C, L), any floating dtype.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; None: the plain average over all batches.
        affine: learn weight (starts at 1) and bias (starts at 0).
        track_running_stats: keep running statistics.
        device: of parameters and buffers.
        dtype: of parameters; statistics are never narrower than float32.
        mean_range: how far the mean of an activation's shift goes (n_μ of the paper).
        std_range: how far the mean of its scale goes, from 1 (n_σ).
        mean_spread: how far a sample's shift is from that of its activation (r_μ).
        std_spread: standard deviation of a sample's scale about that of its activation (r_σ).
        nonfinite: what an inf or NaN in a batch does to the running statistics: "propagate" (as torch), "skip" the
            affected channels, or "raise".

    Raises:
        ValueError: an unknown option or a width out of range; in forward, what `BatchNorm1d` refuses.

    Source: Santurkar, Tsipras, Ilyas & Madry 2018, section 2.2 and appendix A.

    >>> import torch
    >>> layer = NoisyBatchNorm1d(4, std_range=1.5)
    >>> x = torch.randn(8, 4)
    >>> torch.equal(layer(x), layer(x))
    False
    >>> torch.equal(layer.eval()(x), layer(x))
    True
    """


class NoisyBatchNorm2d(_NoisyBatchNorm, nn.BatchNorm2d):
    """Noisy batch normalization over (N, C, H, W); see `NoisyBatchNorm1d` for everything else.

    >>> import torch
    >>> NoisyBatchNorm2d(3)(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 3, 5, 5])
    """


class NoisyBatchNorm3d(_NoisyBatchNorm, nn.BatchNorm3d):
    """Noisy batch normalization over (N, C, D, H, W); see `NoisyBatchNorm1d` for everything else.

    >>> import torch
    >>> NoisyBatchNorm3d(3)(torch.randn(2, 3, 2, 5, 5)).shape
    torch.Size([2, 3, 2, 5, 5])
    """
