"""Mean-only batch normalization in formulas (Salimans & Kingma 2016, section 3.2): centering alone."""

from torch import Tensor

from batchlab.reference.batch_norm import center, per_channel

__all__ = ["mean_only_batch_norm"]


def mean_only_batch_norm(x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Subtract each channel's mean over the batch and add a bias; returns the mean too.

    y = x - μ + bias,    ∂l/∂x = ∂l/∂y - mean of ∂l/∂y

    Shapes:
        x: (N, C, ...); bias: (C,). Returns x's shape, and (C,), both in the statistics' dtype.

    >>> mean_only_batch_norm(torch.tensor([[1.0], [5.0]]))
    (tensor([[-2.],
            [ 2.]]), tensor([3.]))
    """
    # The first estimate of the mean is rounded like x itself; what it left behind is subtracted in a second pass.
    shifted, offset = center(x)
    residue = shifted.sum([dim for dim in range(x.ndim) if dim != 1]) / max(x.numel() // max(x.shape[1], 1), 1)
    y = shifted - per_channel(residue, x.ndim)
    return (y if bias is None else y + per_channel(bias.to(y.dtype), x.ndim)), offset + residue
