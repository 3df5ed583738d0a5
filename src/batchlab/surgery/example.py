"""Running the example that a caller gives, and what can be seen while it runs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchlab.surgery.copies import copy_to_run, preserved_random_state

__all__ = ["Example", "Run", "map_tensors", "run_example", "split_example"]


class Example(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Run(NamedTuple):
    """What one forward showed.

    Attributes:
        output: what the model returned.
        calls: how often each module was called, by name; absent: not at all.
        dimensions: number of dimensions of each module's first input, at its first call.
    """

    output: Any
    calls: dict[str, int]
    dimensions: dict[str, int]


def split_example(example_input: Any) -> Example:
    """Return a call's arguments: a tuple gives positional ones, a dict keyword ones, anything else is the only one."""
    if isinstance(example_input, dict):
        return Example((), dict(example_input))
    return Example(tuple(example_input) if isinstance(example_input, tuple) else (example_input,), {})


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)


@torch.no_grad()
def run_example(model: nn.Module, example: Example) -> Run:
    """Run a copy of `model` in evaluation mode on `example`; the model, its buffers and the random state stay."""
    probe = copy_to_run(model).eval()
    calls: dict[str, int] = {}
    dimensions: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> None:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = calls.get(name, 0) + 1
            x = _first_tensor(args, kwargs)
            if x is not None:
                dimensions.setdefault(name, x.ndim)

        module.register_forward_pre_hook(see, with_kwargs=True)

    for name, module in probe.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):  # its hooks would have to be scripted
            watch(name, module)
    with preserved_random_state(model):
        output = probe(*_copied(example.args), **_copied(example.kwargs))
    return Run(output, calls, dimensions)


def map_tensors(function: Callable[[Tensor], Any], value: Any, others: bool = False) -> Any:
    """The same structure with `function` of its tensors: tuples, named ones too, lists, mappings and dataclasses.

    Args:
        function: of a tensor.
        value: the structure.
        others: leave objects of other classes as they are even if they hold tensors.

    Raises:
        ValueError: an object of another class holds tensors.
    """

    def mapped(part: Any) -> Any:
        return map_tensors(function, part, others)

    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = map(mapped, value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MutableMapping):
        mapping = copy.copy(value)
        for key, part in value.items():
            mapping[key] = mapped(part)
        return mapping
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        other = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(other, field.name, mapped(getattr(value, field.name)))
        return other
    held = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) else ()
    if not others and any(isinstance(part, Tensor) for part in held):
        raise ValueError(
            f"example_input holds an object of {type(value).__name__} with tensors in it; give tensors alone, or in "
            "tuples, lists, dicts, named tuples or dataclasses"
        )
    return value


def _copied(value: Any) -> Any:
    """The same structure with its tensors cloned: a model may write into its input."""
    return map_tensors(lambda tensor: tensor.detach().clone(), value)
