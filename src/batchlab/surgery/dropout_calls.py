"""What a training forward shows of the modules in a model: which were called, on what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchlab.surgery.copies import copy_to_run, preserved_random_state
from batchlab.surgery.example import Example, map_tensors

__all__ = ["cloned", "watch_training"]


def cloned(value: Any, dtype: torch.dtype | None = None) -> Any:
    """The same structure with its tensors cloned; floating ones in `dtype`, if one is given."""

    def clone(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        return copied if dtype is None or not copied.is_floating_point() else copied.to(dtype)

    return map_tensors(clone, value)


@torch.no_grad()
def watch_training(model: nn.Module, example: Example) -> dict[str, set[int | None]]:
    """Run a copy in training mode; return the numbers of dimensions of each called module's inputs, by name.

    None stands for an input that is no tensor. The model, its buffers and the random state stay as they are.

    Raises:
        ValueError: the model does not run.
    """
    probe = copy_to_run(model).train()
    seen: dict[str, set[int | None]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter([*args, *kwargs.values()]), None)
            seen.setdefault(name, set()).add(x.ndim if isinstance(x, Tensor) else None)

        module.register_forward_pre_hook(see, with_kwargs=True)

    for name, module in probe.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):  # its hooks would have to be scripted
            watch(name, module)
    try:
        with preserved_random_state(model):
            probe(*cloned(example.args), **cloned(example.kwargs))
    except Exception as error:
        raise ValueError(
            f"the model does not run on example_input in training mode: {type(error).__name__}: {error}. Give a batch "
            "as in training: a tensor, a tuple of the forward's arguments, or a dict of its keyword arguments"
        ) from error
    return seen
