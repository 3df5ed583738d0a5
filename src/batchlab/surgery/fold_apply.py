"""Carrying out a plan of folds, in place, on a copy of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from batchlab.surgery.channel_pad import ChannelPad
from batchlab.surgery.fold_algebra import Weights, zero_padding
from batchlab.surgery.fold_plan import FoldPlan
from batchlab.surgery.layers import exact_kind

__all__ = ["apply_folds"]

ACTIVATION_MODULES: Final[dict[str, Callable[[], nn.Module]]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = new.eval()


def _set_weights(layer: nn.Module, weights: Weights) -> None:
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight")
    weight.copy_(weights.weight)
    if isinstance(bias, Tensor):
        bias.copy_(weights.bias)
    else:
        layer.bias = nn.Parameter(weights.bias.to(weight), requires_grad=weight.requires_grad)


def _pad_outside(model: nn.Module, name: str, layer: nn.Module, border: Tensor) -> None:
    kind = exact_kind(layer)
    if kind is None or not isinstance(layer.weight, Tensor):
        raise TypeError(f"{type(layer).__name__} is not a convolution that is known")
    pad = ChannelPad(zero_padding(layer, kind), border.to(layer.weight))
    layer.padding = (0,) * kind.spatial  # type: ignore[assignment]
    _replace(model, name, nn.Sequential(pad, layer))


@torch.no_grad()
def apply_folds(model: nn.Module, plan: FoldPlan) -> None:
    """Give the layers their weights, and put an identity, or its activation, in each folded normalization's place."""
    for step in plan.steps:
        activation = getattr(model.get_submodule(step.norm), "activation", None)
        _replace(model, step.norm, nn.Identity() if activation is None else ACTIVATION_MODULES[activation]())
    for name, weights in plan.weights.items():
        layer = model.get_submodule(name)
        _set_weights(layer, weights)
        if weights.border is not None:
            _pad_outside(model, name, layer, weights.border)
