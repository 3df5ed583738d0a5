"""Looking at the inputs of normalizations while batches run through a model that is otherwise left alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from batchlab.reference.batch_norm import moments
from batchlab.surgery.copies import preserved_random_state
from batchlab.surgery.example import map_tensors
from batchlab.surgery.layers import ChannelNorm
from batchlab.surgery.population import Population, add_batch, empty_population

__all__ = ["eager", "gather", "left_as_it_was"]


class _Buffers:
    """One module's buffers as they were: the objects, and copies of their values."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.objects = dict(module._buffers)
        self.values = {key: buffer.clone() for key, buffer in module._buffers.items() if buffer is not None}

    def restore(self) -> None:
        if not isinstance(self.module, torch.jit.ScriptModule):  # which has no names to rebind
            self.module._buffers.clear()
            self.module._buffers.update(self.objects)
        for key, value in self.values.items():
            buffer = self.objects[key]
            # Written only where needed: a write makes a backward fail that is waiting for the buffer.
            if buffer is not None and not torch.equal(buffer, value):
                buffer.copy_(value)


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Give modes, buffers (objects and values) and random state back at the end, whatever happens in between."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [_Buffers(module) for module in model.modules()]
    with preserved_random_state(model):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for saved in buffers:
                saved.restore()


def _move(value: Any, device: torch.device | str | None) -> Any:
    if device is None:
        return value
    return map_tensors(lambda tensor: tensor.to(device), value, others=True)


def _call(model: nn.Module, batch: Any, device: torch.device | str | None) -> None:
    if isinstance(batch, dict):
        model(**_move(batch, device))
        return
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            f"a batch is a {type(batch).__name__} that does not start with a tensor; give tensors, tuples or lists "
            "whose first element is the input, dicts of keyword arguments, or say what to do by forward(model, batch)"
        )
    model(_move(x, device))


def _look_at(layer: ChannelNorm, populations: dict[ChannelNorm, Population]) -> Any:
    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("x", kwargs.get("input"))
        if not isinstance(x, Tensor) or x.ndim < 2:
            return  # the layer's own error says more
        mask = kwargs.get("mask")
        batch = moments(x.detach().double(), None if mask is None else mask.to(torch.bool))
        before = populations.get(layer) or empty_population(layer)
        populations[layer] = add_batch(before, batch)

    return layer.register_forward_pre_hook(look, with_kwargs=True)


def eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """What `model.compile()` compiled may not see hooks that came later, and is not to be compiled again for them."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def gather(
    model: nn.Module,
    layers: list[ChannelNorm],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    device: torch.device | str | None,
) -> tuple[dict[ChannelNorm, Population], int]:
    """Run all batches; return the population of each layer that was reached, and the number of batches.

    `layers` normalize with the statistics of each batch, everything else is in evaluation mode.
    """
    populations: dict[ChannelNorm, Population] = {}
    count = 0
    with left_as_it_was(model), eager(model):
        # The attribute, not .eval() and .train(): models override those to do more than set a mode.
        using_batch = set(layers)
        for module in model.modules():
            module.training = module in using_batch
        handles = []
        try:
            for layer in layers:
                handles.append(_look_at(layer, populations))
            for batch in batches:
                count += 1
                if forward is not None:
                    forward(model, _move(batch, device))
                else:
                    _call(model, batch, device)
        except Exception as error:
            error.add_note(f"in recalibrate, after {count} batches were drawn; the model is as it was")
            raise
        finally:
            for handle in handles:
                handle.remove()
    return populations, count
