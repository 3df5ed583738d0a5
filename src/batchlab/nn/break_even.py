"""Submatrix or mask: which is faster for this chain, this size of batch, on this machine? Measured, once."""

from __future__ import annotations

import copy
import time
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn

from batchlab.functional.submatrix import ACCEPTS
from batchlab.functional.submatrix_gradient import SubmatrixGradient
from batchlab.functional.submatrix_step import momentum_step

__all__ = ["faster_mode"]

ROUNDS: Final = 7
CLEAR: Final = 1.5
"""A ratio of two times that needs no second look."""


def _key(chain: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """What the choice depends on; batch sizes count by powers of two, so that an odd last batch is no new case."""
    batch = x.shape[0].bit_length() if x.ndim and x.shape[0] else 0
    dropouts = tuple((m.p, m.exact) for m in chain.modules() if hasattr(m, "kept") and getattr(m, "active", False))
    threads = torch.get_num_threads()
    return batch, x.shape[1:], x.dtype, x.device, dropouts, torch.is_grad_enabled(), threads


def _copy(chain: nn.Module) -> nn.Module:
    """A copy to train for nothing: same values, and gradients of the same kind."""
    twin = copy.deepcopy(chain)
    for own, other in zip(chain.parameters(), twin.parameters(), strict=True):
        other.grad = None
        setattr(other, ACCEPTS, getattr(own, ACCEPTS, False))
    for module in twin.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            hooks.clear()
    return twin


def _step(twin: nn.Module, velocities: dict[nn.Parameter, Tensor], x: Tensor, mode: str) -> float:
    """Seconds of a forward, a backward, and the optimizer's work where that depends on the gradient's kind."""
    twin.mode = mode  # type: ignore[assignment]
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    started = time.perf_counter()
    y = twin(x)
    if torch.is_grad_enabled() and y.requires_grad:
        y.backward(torch.ones_like(y))
        changed = [p for p in twin.parameters() if isinstance(p.grad, SubmatrixGradient)]
        for parameter in changed:
            if parameter not in velocities:
                velocities[parameter] = torch.zeros_like(parameter)
        if changed:
            with torch.no_grad():
                gradients = [p.grad for p in changed if p.grad is not None]
                momentum_step(changed, [velocities[p] for p in changed], gradients, 0.0, 0.9, 0.0, False)
        for parameter in twin.parameters():
            parameter.grad = None
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - started


def _measure(chain: nn.Module, x: Tensor) -> str:
    twin = _copy(chain)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    velocities: dict[nn.Parameter, Tensor] = {}
    times: dict[str, list[float]] = {"submatrix": [], "mask": []}
    keep = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)  # not a checkpoint's
    with keep, torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for number in range(-1, ROUNDS):
            for mode, seconds in times.items():
                taken = _step(twin, velocities, x, mode)
                if number >= 0:  # the first of each compiles, allocates and warms up
                    seconds.append(taken)
            middle = {mode: median(seconds) for mode, seconds in times.items() if seconds}
            if middle and max(middle.values()) > CLEAR * min(middle.values()):
                break
    return min(middle, key=lambda mode: middle[mode])


def faster_mode(chain: nn.Module, x: Tensor, known: dict[Any, str]) -> str:
    """The faster mode for batches like `x`: from `known`, or measured on a copy and remembered there.

    Parameters, buffers, gradients and random states are as before.
    """
    key = _key(chain, x)
    if key not in known:
        known[key] = _measure(chain, x)
    return known[key]
