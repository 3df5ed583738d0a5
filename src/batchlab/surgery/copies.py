"""Copies of a model to work on, so that looking at it cannot change it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["copy_model", "copy_to_run", "preserved_random_state", "remove_forward_hooks"]


def _what_deepcopy_cannot(model: nn.Module) -> dict[int, Any]:
    """Copies, by id, of attributes that deepcopy refuses: process groups, and tensors inside an autograd graph."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()  # weight_norm's `weight`, made anew by each forward
            elif dist.is_available() and isinstance(value, dist.ProcessGroup):
                memo[id(value)] = value
    return memo


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied: {type(error).__name__}: {error}. Surgery works on copies; take the attribute "
            "that refuses (a lock, an open file, a generator) off the model, or give it a __deepcopy__"
        ) from error


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy that shares no tensor with `model`."""
    return _deepcopy(model, _what_deepcopy_cannot(model))


def copy_to_run(model: nn.Module) -> nn.Module:
    """Return a copy to run or trace and throw away: it shares the parameters, but nothing that a forward may change."""
    return _deepcopy(
        model, _what_deepcopy_cannot(model) | {id(parameter): parameter for parameter in model.parameters()}
    )


def remove_forward_hooks(model: nn.Module) -> None:
    """Take every forward hook off `model`, in place."""
    for module in model.modules():
        for key, value in vars(module).items():
            if key.startswith(("_forward_hooks", "_forward_pre_hooks")):
                value.clear()


@contextmanager
def preserved_random_state(model: nn.Module) -> Iterator[None]:
    """Leave the random generators (torch's on the CPU and on the model's devices, numpy's, Python's) as they were."""
    cuda = {t.device for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(cuda, key=str)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
