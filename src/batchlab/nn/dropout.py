"""Dropout layers: torch's with shared axes, and two whose noise drops nothing (Gaussian, uniform)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from batchlab.functional.dropout import (
    check_beta,
    check_gaussian_rate,
    checked_share,
    dropout,
    gaussian_dropout,
    uniform_dropout,
)
from batchlab.functional.dropout_pattern import check_rate

__all__ = ["Dropout", "GaussianDropout", "UniformDropout"]


class Dropout(nn.Dropout):
    """Drop entries of the input, independently or in groups; a drop-in for `torch.nn.Dropout`.

    training:    y = x · m / (1 - p)        m: 1 with probability 1 - p, else 0; one m along the dimensions `share`
    evaluation:  y = x

    Which dropout it is depends on what shares a random number, for x of (N, C, H, W):

        share=None       every entry for itself: torch's dropout, bit for bit
        share=(2, 3)     whole feature maps: torch's Dropout2d
        share=(0,)       one mask for all samples (`BatchwiseDropout` also saves the work)
        share=(1, 2, 3)  whole samples
        share=(1,)       (N, L, C): one mask for all steps of a sequence, "locked" or variational dropout

    Shapes:
        input, output: any shape that has the shared dimensions; dtype and memory format are kept.

    Args:
        p: probability to drop, 0 to 1.
        inplace: write into the input.
        share: dimensions along which entries are dropped together; negative ones count from the end.

    Raises:
        TypeError: `share` is not made of whole numbers; with `share`, an input that is not floating-point.
        ValueError: p is no probability; in forward, an input without a shared dimension.

    Source: Srivastava et al. 2014 in the inverted form; feature maps: Tompson et al. 2015; sequences: Gal &
    Ghahramani 2016.

    >>> import torch
    >>> y = Dropout(0.5, share=(2, 3))(torch.ones(4, 8, 5, 5))
    >>> bool((y == y[:, :, :1, :1]).all()), sorted(y.unique().tolist())
    (True, [0.0, 2.0])
    """

    share: tuple[int, ...] | None = None

    def __init__(self, p: float = 0.5, inplace: bool = False, *, share: int | Sequence[int] | None = None) -> None:
        check_rate(p)
        super().__init__(p, inplace)
        self.share = checked_share(share) or None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Drop in training; return the input as it is in evaluation."""
        return dropout(input, self.p, self.training, self.inplace, share=self.share)

    def extra_repr(self) -> str:
        """Torch's line, and what is shared."""
        shared = "" if self.share is None else f", share={self.share}"
        return super().extra_repr() + shared


class GaussianDropout(_DropoutNd):
    """Multiply by normal noise of the mean and variance that dropout's noise has.

    training:    y = x + x · r,   r ~ N(0, p/(1 - p))
    evaluation:  y = x

    Nothing becomes zero, so no work can be left out; gradients reach every unit in every step.

    Shapes:
        input, output: any; dtype and memory format are kept.

    Args:
        p: the dropout rate that it stands for, 0 up to but not including 1.
        inplace: write into the input.

    Raises:
        TypeError: in forward, an input that is not floating-point.
        ValueError: p is out of range.

    Source: Srivastava et al. 2014, section 10.

    >>> import torch
    >>> y = GaussianDropout(0.2)(torch.ones(100_000))
    >>> abs(y.mean().item() - 1) < 0.01, abs(y.var().item() - 0.25) < 0.01
    (True, True)
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        check_gaussian_rate(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Disturb in training; return the input as it is in evaluation."""
        return gaussian_dropout(input, self.p, self.training, self.inplace)


class UniformDropout(nn.Module):
    """Multiply by uniform noise around 1: "Uout", which hardly shifts the variance for a batch norm behind it.

    training:    y = x + x · r,   r ~ U(-beta, beta)
    evaluation:  y = x

    For inputs with mean 0 the variance in evaluation is 3/(3 + beta²) of that in training: 0.997 at beta = 0.1, where
    dropout with p = 0.5 has 0.5.

    Shapes:
        input, output: any; dtype and memory format are kept.

    Args:
        beta: half-width of the noise, 0 to 1.
        inplace: write into the input.

    Raises:
        TypeError: in forward, an input that is not floating-point.
        ValueError: beta is out of range.

    Source: Li et al. 2018 (arXiv 1801.05134), "Uout".

    >>> import torch
    >>> UniformDropout(0.1)
    UniformDropout(beta=0.1, inplace=False)
    >>> UniformDropout(0.1).eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    def __init__(self, beta: float = 0.1, inplace: bool = False) -> None:
        super().__init__()
        check_beta(beta)
        self.beta = beta
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Disturb in training; return the input as it is in evaluation."""
        return uniform_dropout(input, self.beta, self.training, self.inplace)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"beta={self.beta}, inplace={self.inplace}"
