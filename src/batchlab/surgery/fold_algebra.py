"""The algebra of folding, in float64 (Ioffe & Szegedy 2015, Algorithm 2, line 11, taken into the weights).

With s = γ/√(var + eps) and t = β - mean·s a normalization in inference is s·x + t per channel. After a layer W x + b:
W' = diag(s) W, b' = s b + t. Before it: W' = W diag(s), b' = b + W t, and what the layer pads with, v, becomes the v'
with s·v' + t = v.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchlab.surgery.layers import ChannelNorm, LayerKind, has_statistics, running_statistics

__all__ = ["CannotFoldError", "Weights", "fold_after", "fold_before", "scale_and_shift", "weights_of", "zero_padding"]


class CannotFoldError(Exception):
    """The layer cannot take the normalization in exactly; the message says why."""


class Weights(NamedTuple):
    """A linear layer in float64.

    Attributes:
        weight: as the layer has it.
        bias: (out,), zeros if the layer has none.
        border: (in,), what the layer's zero padding is to be filled with; None: zeros.
    """

    weight: Tensor
    bias: Tensor
    border: Tensor | None


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(device="cpu", dtype=torch.float64)


def scale_and_shift(norm: ChannelNorm) -> tuple[Tensor, Tensor]:
    """Return s and t of the normalization in inference, s·x + t."""
    if not has_statistics(norm):
        raise CannotFoldError("it has no running statistics")
    running_mean, running_var = running_statistics(norm)
    # Without a mean nothing is subtracted, without a variance nothing divided.
    mean = torch.zeros(norm.num_features, dtype=torch.float64) if running_mean is None else _wide(running_mean)
    scale = torch.ones(norm.num_features, dtype=torch.float64)
    if running_var is not None:
        var, eps = _wide(running_var), float(norm.eps)  # type: ignore[arg-type]
        if not (var >= 0).all():
            raise CannotFoldError("its running variance is negative or not a number")
        scale = 1 / (var + eps).sqrt()
    if norm.weight is not None:
        scale = scale * _wide(norm.weight)
    shift = -mean * scale if norm.bias is None else _wide(norm.bias) - mean * scale
    if not (scale.isfinite().all() and shift.isfinite().all()):
        raise CannotFoldError("its statistics, weight or bias are not finite, or a variance is 0 with eps 0")
    return scale, shift


def weights_of(layer: nn.Module, kind: LayerKind) -> Weights:
    """Return a layer's weight and bias in float64, on the CPU (not every device has float64)."""
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, Tensor):
        raise CannotFoldError("the layer's weight is not a tensor")
    out = weight.shape[1] * groups_of(layer) if kind.transposed else weight.shape[0]
    no_bias = torch.zeros(out, dtype=torch.float64)
    return Weights(_wide(weight), _wide(bias) if isinstance(bias, Tensor) else no_bias, None)


def groups_of(layer: nn.Module) -> int:
    """Return the number of groups; a linear layer has one."""
    groups = getattr(layer, "groups", 1)
    return groups if isinstance(groups, int) else 1


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """View as (groups, first/groups, second, positions): both of conv's and transposed conv's layouts group dim 0."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _scaled(weight: Tensor, scale: Tensor, groups: int, dim: int) -> Tensor:
    """Scale dimension `dim` (1: the first, grouped one; 2: the second) of a grouped weight by a value per channel."""
    factors = scale.view(groups, -1, 1, 1) if dim == 1 else scale.view(groups, 1, -1, 1)
    return (_by_group(weight, groups) * factors).reshape(weight.shape)


def fold_after(layer: Weights, scale: Tensor, shift: Tensor, kind: LayerKind, groups: int) -> Weights:
    """Return the layer followed by s·y + t as one layer.

    A convolution's weight is (out, in/groups, ...), a transposed one's (in, out/groups, ...).
    """
    weight = _scaled(layer.weight, scale, groups, 2 if kind.transposed else 1)
    return layer._replace(weight=weight, bias=layer.bias * scale + shift)


def fold_before(
    layer: Weights, scale: Tensor, shift: Tensor, kind: LayerKind, groups: int, *, pads: bool, pointwise: bool
) -> Weights:
    """Return s·x + t followed by the layer as one layer.

    Args:
        layer: what takes the normalization in.
        scale: s, (in,).
        shift: t, (in,).
        kind: its kind.
        groups: its groups.
        pads: it pads with zeros (or `layer.border`).
        pointwise: each output position depends on one input position alone.

    Raises:
        CannotFoldError: the shift reaches a border differently from the inside, and no padding value makes up for it.
    """
    if kind.transposed and not pointwise and (shift != 0).any():
        raise CannotFoldError(
            "a transposed convolution spreads the normalization's shift unevenly at its border and strides, which no "
            "bias can express"
        )
    weight = _scaled(layer.weight, scale, groups, 1 if kind.transposed else 2)
    grouped = _by_group(layer.weight, groups)
    shifted = grouped * (shift.view(groups, -1, 1, 1) if kind.transposed else shift.view(groups, 1, -1, 1))
    bias = layer.bias + shifted.sum((1, 3) if kind.transposed else (2, 3)).flatten()
    return Weights(weight, bias, _border(layer.border, scale, shift) if pads else None)


def _border(border: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor | None:
    target = torch.zeros_like(shift) if border is None else border
    lost = (scale == 0) & (shift != target)
    if lost.any():
        raise CannotFoldError(
            f"it pads with zeros, and the normalization's scale is 0 in {int(lost.sum())} channels whose shift is not: "
            "no padding value before the normalization gives 0 after it"
        )
    value = torch.where(scale == 0, 0, (target - shift) / torch.where(scale == 0, 1, scale))
    return value if (value != 0).any() else None


def zero_padding(layer: nn.Module, kind: LayerKind) -> list[int]:
    """Return the sizes of a convolution's zero padding in the order of `torch.nn.functional.pad`; all 0 if none."""
    if kind.spatial == 0 or kind.transposed or getattr(layer, "padding_mode", "zeros") != "zeros":
        return [0] * (2 * kind.spatial)
    padding, kernel, dilation = (getattr(layer, name) for name in ("padding", "kernel_size", "dilation"))
    sizes: list[int] = []
    for i in reversed(range(kind.spatial)):
        if padding == "same":
            total = dilation[i] * (kernel[i] - 1)
            sizes += (total // 2, total - total // 2)
        else:
            sizes += (0, 0) if padding == "valid" else (padding[i], padding[i])
    return sizes


def is_pointwise(layer: nn.Module) -> bool:
    """Say whether a transposed convolution has kernel 1, stride 1 and no padding."""
    settings = [(layer.kernel_size, 1), (layer.stride, 1), (layer.padding, 0), (layer.output_padding, 0)]
    return all(value == expected for values, expected in settings for value in values)  # type: ignore[union-attr]
