"""Running the example that a caller gives, and what can be seen while it runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchlab.surgery.copies import copy_to_run, preserved_random_state

__all__ = ["Example", "Run", "run_example", "split_example"]


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


def _copied(value: Any) -> Any:
    """The same structure with its tensors cloned: a model may write into its input."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    return {key: _copied(item) for key, item in value.items()} if type(value) is dict else value
