"""Turning dropouts and Sequentials into batchwise ones, as the objects they are, and back if anything fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from batchlab.surgery.dropout_plan import Plan

__all__ = ["apply_conversion"]

OF_EVERY_MODULE: Final = frozenset(vars(nn.Module()))


def _become(module: nn.Module, new: nn.Module, without: Iterable[str] = ()) -> None:
    """Give a module the class and the own attributes of `new`; it keeps its identity, children, hooks and mode.

    So every reference stays valid: other names, lists and closures that hold the module too.
    """
    own = {key: value for key, value in vars(new).items() if key not in OF_EVERY_MODULE}
    module.__class__ = type(new)
    for key in without:
        vars(module).pop(key, None)
    vars(module).update(own)


def apply_conversion(model: nn.Module, plan: Plan, exact: bool, mode: str, generator: torch.Generator | None) -> None:
    """Do what was planned, in place; all of it or, on any exception, nothing."""
    dropouts = {model.get_submodule(name): dim for name, dim in plan.dims.items()}
    chains = [model.get_submodule(name) for name in plan.chains]
    before = [(module, type(module), dict(vars(module))) for module in [*dropouts, *chains]]
    try:
        for module, dim in dropouts.items():
            rate: Any = module.p
            new = BatchwiseDropout(rate, exact=exact, generator=generator, dim=dim)
            _become(module, new, without=["inplace"])
        for module in chains:
            _become(module, SubmatrixSequential(mode=mode))
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        raise
