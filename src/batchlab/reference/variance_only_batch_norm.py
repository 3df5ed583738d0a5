"""Variance-only batch normalization in formulas: the rescaling of Ioffe & Szegedy 2015 alone."""

from torch import Tensor

from batchlab.reference.batch_norm import center, moments, per_channel, statistics_dtype, unbiased_variance, variance

__all__ = ["rescale", "variance_only_batch_norm"]


def rescale(
    x: Tensor, var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Divide each channel by its standard deviation, then scale and shift.

    y = weight · x / √(var + eps) + bias

    >>> rescale(torch.tensor([[3.0]]), torch.tensor([4.0]), eps=0.0)
    tensor([[1.5000]])
    """
    scale = 1 / (var + eps).sqrt()
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    y = x.to(scale.dtype) * per_channel(scale, x.ndim)
    return y if bias is None else y + per_channel(bias.to(y.dtype), x.ndim)


def variance_only_batch_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Rescale with the batch's biased variance about its mean; returns the unbiased one too.

    y = weight · x / √(σ² + eps) + bias,  σ² = mean of (x - μ)²

    The mean stays, divided by σ. The gradient goes through σ², and so through μ.

    Shapes:
        x: (N, C, ...); weight, bias: (C,). Returns x's shape, and (C,), both in the statistics' dtype.

    >>> y, var = variance_only_batch_norm(torch.tensor([[1.0], [5.0]]), eps=0.0)
    >>> y.flatten().tolist(), var.item()
    ([0.5, 2.5], 8.0)
    """
    shifted, _ = center(x)
    group = moments(shifted)
    return rescale(x.to(statistics_dtype(x.dtype)), variance(group), weight, bias, eps), unbiased_variance(group)
