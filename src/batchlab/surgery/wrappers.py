"""What surgery cannot look into: wrappers, scripted models, and parameters that have no values yet."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["check_model"]

# By class name, so that asking imports neither torch.distributed.fsdp nor the compiler.
WRAPPERS: Final = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def _wrapped_in(module: nn.Module) -> tuple[str, str] | None:
    for cls in type(module).__mro__:
        if cls.__name__ in WRAPPERS and cls.__module__.startswith("torch."):
            return cls.__name__, WRAPPERS[cls.__name__]
    return None


def check_model(model: nn.Module, verb: str) -> None:
    """Raise unless `model` is a plain module with initialized parameters, all the way down.

    Raises:
        TypeError: not a module, a wrapper (DistributedDataParallel, DataParallel, FullyShardedDataParallel, what
            torch.compile returns) or a scripted module; the message says what to pass instead.
        ValueError: a lazy parameter or buffer without a shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} needs a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        wrapper = _wrapped_in(module)
        if wrapper is not None:
            kind, attribute = wrapper
            made_by = "torch.compile wrapped it; " if kind == "OptimizedModule" else ""
            path = f"model.{name}" if name else "model"
            way_out = f"pass {path}.{attribute}" if not name else f"replace {path} by {path}.{attribute} for the while"
            raise TypeError(f"{path} is a {kind}: {made_by}{way_out}, and wrap the result again")
        if not name and isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model is a {type(module).__name__}, compiled by torch.jit, and cannot be changed: {verb} the Python "
                "model first, then script the result"
            )
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if is_lazy(value):
                raise ValueError(
                    f"'{f'{name}.{key}'.lstrip('.')}' of {type(module).__name__} is not initialized: run one batch "
                    f"through the model first, then {verb} it"
                )
