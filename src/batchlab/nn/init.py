"""Initial weights for layers between rectifiers, with dropout and groups counted in (He et al. 2015, section 2.2).

`surgery.initialize` does a whole model and finds the slopes. Xavier's initialization is `negative_slope=1`.

>>> import torch
>>> weight = he_normal_(torch.empty(512, 200), negative_slope=0.25, keep=0.5)
>>> abs(weight.std().item() / (2 * 0.5 / (1 + 0.25**2) / 200) ** 0.5 - 1) < 0.02
True
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from batchlab.reference import initialization as reference

__all__ = ["he_normal_", "he_uniform_"]

MODES: Final = ("forward", "backward")


def check_mode(mode: str) -> None:
    """Raise unless `mode` is "forward" or "backward"."""
    if mode not in MODES:
        raise ValueError(
            f"mode is {mode!r}; allowed are 'forward', which keeps the variance of activations (torch's fan_in), and "
            "'backward', which keeps that of gradients (fan_out)"
        )


def _deviation(
    tensor: Tensor,
    negative_slope: float,
    mode: str,
    keep: float,
    groups: int,
    transposed: bool,
    stride: int | Sequence[int],
) -> float:
    check_mode(mode)
    if not tensor.is_floating_point():
        raise TypeError(f"the tensor has dtype {tensor.dtype}; weights to initialize are floating-point")
    if tensor.ndim < 2:
        raise ValueError(
            f"the tensor has shape {tuple(tensor.shape)}; a weight is (out, in) or (out, in/groups, *kernel)"
        )
    if not math.isfinite(negative_slope):
        raise ValueError(f"negative_slope is {negative_slope}; it must be finite: 0 for ReLU, 1 for no rectifier")
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it is the share that the dropout in front keeps, above 0 and at most 1")
    if groups < 1 or tensor.shape[0] % groups:
        raise ValueError(f"groups is {groups}, which does not divide the first of the sizes {tuple(tensor.shape)}")
    spatial = tensor.ndim - 2
    strides = [stride] * spatial if isinstance(stride, int) else list(stride)
    if len(strides) != spatial or any(size < 1 for size in strides):
        raise ValueError(f"stride is {stride}; give one size of 1 or more, or {spatial} for {tuple(tensor.shape)}")
    if not tensor.numel():
        return 0.0
    terms = reference.terms(tensor.shape, mode, groups=groups, transposed=transposed, stride=strides)
    return math.sqrt(reference.weight_variance(terms, negative_slope, keep))


@torch.no_grad()
def he_normal_(
    tensor: Tensor,
    negative_slope: float = 0.0,
    *,
    mode: str = "forward",
    keep: float = 1.0,
    groups: int = 1,
    transposed: bool = False,
    stride: int | Sequence[int] = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with normal values that keep the variance from layer to layer, in place; return it.

    std = √(2 keep / ((1 + negative_slope²) n)),   n = k² c_in / groups forward, k² c_out / groups backward

    Without dropout and groups this is `torch.nn.init.kaiming_normal_`. That function cannot see groups (backward its
    fan_out is `groups` times too large) nor that a layer is transposed (its fan_in and fan_out are then exchanged).

    Shapes:
        tensor: (c_out, c_in) or (c_out, c_in/groups, *kernel); (c_in, c_out/groups, *kernel) where transposed.

    Args:
        tensor: changed in place.
        negative_slope: a of the rectifier max(0, y) + a min(0, y): 0 for ReLU, 0.25 for a new PReLU, 1 where there is
            none. Forward that in front of the layer counts, backward that behind it.
        mode: "forward" keeps the variance of activations, "backward" that of gradients.
        keep: 1 - p of an inverted dropout in front of the layer, which makes both 1/keep times as large.
        groups: of a convolution.
        transposed: of a transposed convolution.
        stride: of a convolution; with stride s each input of it (each output, transposed) meets 1/s of the kernel.
        generator: where values are drawn from; None: torch's default.

    Raises:
        TypeError: not a floating dtype.
        ValueError: an argument out of its range, or a tensor with fewer than two dimensions.

    Source: He et al. 2015, equations 10, 14 and 15; `keep` and `stride` custom.

    >>> import torch
    >>> weight = he_normal_(torch.empty(64, 8, 3, 3), mode="backward", groups=4)
    >>> abs(weight.std().item() / (2 / (9 * 64 / 4)) ** 0.5 - 1) < 0.05
    True
    """
    std = _deviation(tensor, negative_slope, mode, keep, groups, transposed, stride)
    return tensor.normal_(0, std, generator=generator)


@torch.no_grad()
def he_uniform_(
    tensor: Tensor,
    negative_slope: float = 0.0,
    *,
    mode: str = "forward",
    keep: float = 1.0,
    groups: int = 1,
    transposed: bool = False,
    stride: int | Sequence[int] = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with uniform values of the same variance as `he_normal_`, in place; return it.

    U(-bound, bound),   bound = √3 · std,   with std and all arguments as in `he_normal_`

    >>> import torch
    >>> bool(he_uniform_(torch.empty(64, 32)).abs().max() <= (3 * 2 / 32) ** 0.5)
    True
    """
    bound = math.sqrt(3) * _deviation(tensor, negative_slope, mode, keep, groups, transposed, stride)
    return tensor.uniform_(-bound, bound, generator=generator)
