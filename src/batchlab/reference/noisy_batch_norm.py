"""Noise behind batch normalization in formulas (Santurkar et al. 2018, section 2.2 and appendix A)."""

import torch
from torch import Tensor

from batchlab.reference.batch_norm import statistics_dtype

__all__ = ["add_noise"]


def _uniform(x: Tensor, shape: torch.Size, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, dtype=statistics_dtype(x.dtype), device=x.device)


def add_noise(x: Tensor, mean_range: float, std_range: float, mean_spread: float, std_spread: float) -> Tensor:
    """Shift and scale every activation of every sample by noise whose distribution is drawn anew in each call.

    For each activation j (an entry of x[0]):   μ_j ~ U(-mean_range, mean_range),   σ_j ~ U(1, std_range)
    for each sample i of it:   m_ij ~ U(μ_j - mean_spread, μ_j + mean_spread),   s_ij ~ N(σ_j, std_spread²)
    y_ij = s_ij · x_ij + m_ij

    In the order μ, σ, m, s from torch's default generator of x's device.

    >>> add_noise(torch.ones(2, 3), mean_range=0.0, std_range=1.0, mean_spread=0.0, std_spread=0.0)
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    mean = _uniform(x, x.shape[1:], -mean_range, mean_range)
    std = _uniform(x, x.shape[1:], 1.0, std_range)
    shift = mean + _uniform(x, x.shape, -mean_spread, mean_spread)
    scale = std + std_spread * torch.randn(x.shape, dtype=shift.dtype, device=x.device)
    return x.to(shift.dtype) * scale + shift  # x first: the result is laid out as it is
