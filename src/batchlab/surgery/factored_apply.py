"""Making layers factored or plain, as the objects that they are, and back if anything fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from batchlab.nn.factored_layer import FactoredLayer
from batchlab.surgery.factored_plan import FACTORED, Conversion
from batchlab.surgery.layers import own_type

__all__ = ["current_weight", "factor_in_place", "merge_in_place", "undone_on_exception"]

LOADING: Final = "_load_state_dict_pre_hooks"
STORES: Final = ("_parameters", "_buffers", "_modules", LOADING)


@contextmanager
def undone_on_exception(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Give layers their class, attributes, parameters and gradients back if the block raises, whatever it raises."""
    before = [
        (layer, type(layer), dict(vars(layer)), {store: dict(vars(layer)[store]) for store in STORES})
        for layer in layers
    ]
    gradients = [(p, p.grad) for layer, *_ in before for p in layer.parameters()]
    try:
        yield
    except BaseException:
        for layer, cls, attributes, stores in before:
            layer.__class__ = cls
            vars(layer).clear()
            vars(layer).update(attributes)
            for store, contents in stores.items():
                current = vars(layer)[store]
                current.clear()
                current.update(contents)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        raise


def _put_first(layer: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Give a layer parameters in front of those that it has."""
    rest = dict(layer._parameters)
    layer._parameters.clear()
    layer._parameters.update(parameters | rest)


@torch.no_grad()
def current_weight(layer: nn.Module) -> Tensor:
    """A copy of a layer's effective weight; a parametrization is evaluated, which changes none of its buffers."""
    modes = [(module, module.training) for module in layer.modules()]
    try:
        for module, _ in modes:
            module.training = False
        weight = layer.weight
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight")
    return weight.detach().clone()


def _drop_torchs_loading_hook(layer: nn.Module) -> None:
    """weight_norm's hook renames keys, which the layer does itself now, and cannot be pickled."""
    hooks = vars(layer)[LOADING]
    for key, wrapped in list(hooks.items()):
        hook = getattr(wrapped, "hook", wrapped)
        if getattr(hook, "__name__", "") == "_weight_norm_compat_hook":
            del hooks[key]


def factor_in_place(conversion: Conversion, factorization: str, eps: float) -> None:
    """Make a stock layer, or one with torch's parametrization, a factored one; everything else on it stays."""
    layer = conversion.layer
    layer.__class__ = FACTORED[own_type(layer)]
    if layer._modules.pop("parametrizations", None) is not None:
        _drop_torchs_loading_hook(layer)
    if layer._parameters.pop("weight", None) is not None:
        conversion.v.grad = None  # it was that of the weight, which is another function of the loss
    _put_first(layer, {"g": conversion.g, "v": conversion.v})
    layer._buffers.update({"left": conversion.left, "right": conversion.right})
    vars(layer).update({"factorization": factorization, "eps": eps})


def merge_in_place(layer: FactoredLayer) -> None:
    """Make a factored layer torch's own with the effective weight; everything else on it stays."""
    weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.v.requires_grad)
    plain: nn.Module = layer
    plain.__class__ = layer.stock
    for name in ("g", "v"):
        del plain._parameters[name]
    _put_first(plain, {"weight": weight})
    for name in ("left", "right"):
        del plain._buffers[name]
    for name in ("factorization", "eps"):
        del vars(plain)[name]
