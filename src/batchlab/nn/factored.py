"""Linear and convolution layers with factored weights (Salimans & Kingma 2016, and three relatives)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.common_types import _size_1_t, _size_2_t, _size_3_t
from torch.nn.modules.conv import _ConvNd

from batchlab.nn.factored_layer import FactoredLayer

__all__ = ["FactoredConv1d", "FactoredConv2d", "FactoredConv3d", "FactoredLinear"]

Device = torch.device | str | None
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class FactoredLinear(FactoredLayer, nn.Linear):
    """A linear layer whose weight is a direction v and a gain g, trained in the weight's place.

    y = x wᵀ + bias, with v̄, ‖v‖ and std(v) (unbiased) of each output unit's row:

    "weight_norm":             w = g · v / max(‖v‖, eps)
    "centered_weight_norm":    w = g · (v - v̄) / max(‖v - v̄‖, eps)
    "weight_standardization":  w = g · (v - v̄) / (std(v) + eps)
    "spectral_norm":           w = g · v / σ(v),  σ the largest singular value of v

    Parameters are `v` (the weight's shape), `g` ((units, 1); spectral_norm: one gain, (1, 1)) and `bias`. `weight` is
    the effective weight, read-only. A new layer starts with torch's random weight (less each unit's mean, where that is
    dropped) and the gain that belongs to it. The papers' fixed gains (weight_standardization and spectral_norm: 1,
    centered_weight_norm: √2) are `torch.nn.init.constant_(layer.g, 1)` and `layer.g.requires_grad_(False)`.

    * Lengths are float32 or wider whatever the dtype. A v of zeros gives zeros and finite gradients.
    * spectral_norm estimates σ by the buffers `left` and `right`, float32 or wider; each forward in training improves
      them by one step of the power iteration, evaluation uses them as they are.
    * `from_module` and `merged` go from a stock layer and back; `set_weight` writes a weight into the factors, and
      initializers of torch.nn.init are for it: `layer.set_weight(torch.nn.init.orthogonal_(torch.empty(3, 4)))`. On
      `v` they set the direction, and the gain stays.
    * Checkpoints of stock layers and of torch.nn.utils' weight_norm and spectral_norm, old and new, load strictly.
      `layer.merged().state_dict()` is one for a stock layer.

    Shapes:
        input: (..., in_features); output: (..., out_features).

    Args:
        in_features: size of each input.
        out_features: number of units.
        bias: learn a bias.
        device: of parameters and buffers.
        dtype: of parameters.
        factorization: see above.
        eps: smallest length of v (added to the deviation in weight_standardization); weights that are longer are
            exact.

    Raises:
        ValueError: an unknown factorization, eps not above 0, or a centred factorization of one weight per unit, which
            would always be zero.

    Source: Salimans & Kingma 2016, section 2; Huang et al. 2017; Qiao et al. 2019; Miyato et al. 2018.

    >>> import torch
    >>> layer = FactoredLinear(4, 3)
    >>> layer
    FactoredLinear(in_features=4, out_features=3, bias=True, factorization='weight_norm')
    >>> torch.nn.init.ones_(layer.g)[0, 0]
    tensor(1., grad_fn=<SelectBackward0>)
    >>> torch.allclose(layer.weight.norm(dim=1), torch.ones(3))
    True
    """

    stock = nn.Linear
    unit_dim = -1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        factorization: str = "weight_norm",
        eps: float = 1e-5,
    ) -> None:
        self._start(nn.Linear(in_features, out_features, bias, device, dtype), factorization, eps)

    def _respond(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _FactoredConv(FactoredLayer, _ConvNd):
    def _respond(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class FactoredConv1d(_FactoredConv, nn.Conv1d):
    """1-D convolution with a factored weight; see `FactoredLinear` for v and g, `torch.nn.Conv1d` for the arguments.

    A unit is an output channel, its fan-in the input channels of its group times the kernel.

    >>> import torch
    >>> FactoredConv1d(4, 6, 3, padding=1, groups=2)(torch.randn(2, 4, 9)).shape
    torch.Size([2, 6, 9])
    """

    stock = nn.Conv1d
    unit_dim = -2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: str | _size_1_t = 0,
        dilation: _size_1_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        factorization: str = "weight_norm",
        eps: float = 1e-5,
    ) -> None:
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._start(nn.Conv1d(*geometry, device, dtype), factorization, eps)


class FactoredConv2d(_FactoredConv, nn.Conv2d):
    """2-D convolution with a factored weight; see `FactoredLinear` for v and g, `torch.nn.Conv2d` for the arguments.

    A unit is an output channel, its fan-in the input channels of its group times the kernel.

    >>> import torch
    >>> FactoredConv2d(4, 6, 3, padding=1, groups=2)(torch.randn(2, 4, 9, 9)).shape
    torch.Size([2, 6, 9, 9])
    """

    stock = nn.Conv2d
    unit_dim = -3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        factorization: str = "weight_norm",
        eps: float = 1e-5,
    ) -> None:
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._start(nn.Conv2d(*geometry, device, dtype), factorization, eps)


class FactoredConv3d(_FactoredConv, nn.Conv3d):
    """3-D convolution with a factored weight; see `FactoredLinear` for v and g, `torch.nn.Conv3d` for the arguments.

    A unit is an output channel, its fan-in the input channels of its group times the kernel.

    >>> import torch
    >>> FactoredConv3d(4, 6, 3, padding=1, groups=2)(torch.randn(2, 4, 9, 9, 9)).shape
    torch.Size([2, 6, 9, 9, 9])
    """

    stock = nn.Conv3d
    unit_dim = -4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: str | _size_3_t = 0,
        dilation: _size_3_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        factorization: str = "weight_norm",
        eps: float = 1e-5,
    ) -> None:
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._start(nn.Conv3d(*geometry, device, dtype), factorization, eps)
