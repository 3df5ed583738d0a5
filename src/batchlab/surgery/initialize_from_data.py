"""Start a model with factored weights from one batch (Salimans & Kingma 2016, section 3)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from batchlab.nn.factored_layer import FactoredLayer
from batchlab.surgery.example import split_example
from batchlab.surgery.factored_plan import owners
from batchlab.surgery.gathering import eager, left_as_it_was
from batchlab.surgery.layers import Normalization
from batchlab.surgery.wrappers import check_model

__all__ = ["initialize_from_data"]


@contextlib.contextmanager
def _values_back_on_exception(layers: list[FactoredLayer]) -> Iterator[None]:
    parameters = [p for layer in layers for p in (layer.g, layer.bias) if p is not None]
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        raise


@contextlib.contextmanager
def _layers_called() -> Iterator[None]:
    """Torch's Transformer in evaluation reads its layers' weights, or gives them nested tensors: not now."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _initialize_when_called(name: str, layer: FactoredLayer, reached: set[str]) -> Any:
    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in reached:
            return
        try:
            layer.initialize(args[0] if args else kwargs["input"])
        except ValueError as error:
            raise ValueError(f"layer '{name}' cannot be started from these inputs: {error}") from error
        reached.add(name)

    return layer.register_forward_pre_hook(look, with_kwargs=True)


def _check_not_tied(model: nn.Module, layers: dict[str, FactoredLayer]) -> None:
    tied = owners(model)
    for name, layer in layers.items():
        if any(p is not None and tied[id(p)] > 1 for p in (layer.g, layer.bias)):
            raise ValueError(f"layer '{name}' shares its gain or bias with another module: one start cannot fit both")


@torch.no_grad()
def initialize_from_data(model: nn.Module, inputs: Tensor | tuple[Any, ...] | dict[str, Any]) -> nn.Module:
    """Give every unit of the factored layers mean 0 and deviation 1 on one batch, layer by layer; return the model.

    t = v · x / ‖v‖,  g ← 1/std(t),  b ← -mean(t)/std(t),  x being what the layers before, already started, return

    One forward pass does it all. Batch normalizations use the batch's statistics in it, all else is in evaluation
    mode; afterwards modes, buffers, random states and hooks are as they were. Layers without a bias keep their mean,
    layers that are called several times are started at their first call. spectral_norm layers, and layers that the
    forward does not reach, stay as they were, with a warning. In several processes, do this before the model is
    wrapped, on the same batch.

    Args:
        model: has factored layers (see `to_factored`); on any exception it is as before.
        inputs: a batch, large enough for means and deviations (the paper's code: 500 images): the input, or a tuple
            of the arguments, or a dict of keyword arguments.

    Raises:
        TypeError: the model is wrapped or scripted.
        ValueError: no factored layer to start or none reached; units that return the same for the whole batch, by layer
            and number; gains or biases that several modules share.

    Source: Salimans & Kingma 2016, section 3, equations 5 and 6.

    >>> from batchlab.nn import FactoredLinear
    >>> model = nn.Sequential(FactoredLinear(4, 8), nn.ReLU(), FactoredLinear(8, 3))
    >>> inputs = torch.randn(500, 4)
    >>> outputs = initialize_from_data(model, inputs)(inputs)
    >>> torch.allclose(outputs.std(0, correction=0), torch.ones(3), atol=1e-4)
    True
    """
    check_model(model, "initialize_from_data")
    factored = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactoredLayer)}
    layers = {name: layer for name, layer in factored.items() if layer.factorization != "spectral_norm"}
    if not layers:
        reason = "spectral_norm has one gain for all" if factored else "convert it by to_factored first"
        raise ValueError(f"{type(model).__name__} has no factored layer with a gain for each unit: {reason}")
    _check_not_tied(model, layers)
    args, kwargs = split_example(inputs)
    reached: set[str] = set()
    with _values_back_on_exception(list(layers.values())), left_as_it_was(model), eager(model), _layers_called():
        handles = []
        try:
            for module in model.modules():
                module.training = isinstance(module, Normalization)
            for name, layer in layers.items():
                handles.append(_initialize_when_called(name, layer, reached))
            model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if not reached:
            raise ValueError(f"the forward of {type(model).__name__} reached none of its factored layers")
    left = [f"'{name}'" for name in factored if name not in reached]
    if left:
        warnings.warn(
            f"initialize_from_data left these layers as they were, spectral_norm or not reached: {', '.join(left)}",
            stacklevel=2,
        )
    return model
