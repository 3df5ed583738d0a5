"""Submatrix or mask: which is faster for this chain, this size of batch, on this machine? Measured, once."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn

from batchlab.functional.submatrix import ACCEPTS
from batchlab.functional.submatrix_gradient import SubmatrixGradient
from batchlab.functional.submatrix_step import momentum_step
from batchlab.nn.batchwise_dropout import BatchwiseDropout

__all__ = ["faster_mode"]

ROUNDS: Final = 7
CLEAR: Final = 1.5
"""A ratio of two times that needs no second look."""
TURN_SECONDS: Final = 0.01
MOST_CALLS: Final = 10
"""Short steps are called several times in a turn, for about this long."""


def _key(active: Sequence[BatchwiseDropout], x: Tensor) -> tuple[Any, ...]:
    """What the choice depends on; batch sizes count by powers of two, so that an odd last batch is no new case."""
    shape = x.shape
    batch = shape[0].bit_length() if shape and shape[0] else 0
    dropouts = tuple([(dropout.p, dropout.exact) for dropout in active])
    # Not whether gradients are on: a checkpoint runs without them first, and must choose the same when it runs again.
    return batch, shape[1:], x.dtype, x.device, dropouts, torch.get_num_threads()


def _copy(chain: nn.Module) -> nn.Module:
    """A copy to train for nothing: same values, and gradients of the same kind."""
    inside_a_graph = {
        id(value): value.detach().clone()  # weight_norm's `weight`, made anew by each forward, which deepcopy refuses
        for module in chain.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    twin = copy.deepcopy(chain, inside_a_graph)
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
    if y.requires_grad:
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


def _turn(twin: nn.Module, velocities: dict[nn.Parameter, Tensor], x: Tensor, mode: str, calls: int) -> float:
    """Seconds of a step, as the quickest of some calls in a row: whatever else the machine does only adds."""
    return min(_step(twin, velocities, x, mode) for _ in range(calls))


def _measure(chain: nn.Module, x: Tensor) -> str:
    try:
        twin = _copy(chain)
    except Exception:  # a module that cannot be copied cannot be trained for nothing
        return "submatrix"
    x = x.detach().clone().requires_grad_(x.requires_grad)
    velocities: dict[nn.Parameter, Tensor] = {}
    keep = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)  # not a checkpoint's
    with keep, torch.enable_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        # The first of each compiles, allocates and warms up.
        slowest = max(_turn(twin, velocities, x, mode, 2) for mode in ("submatrix", "mask"))
        calls = max(1, min(MOST_CALLS, round(TURN_SECONDS / max(slowest, 1e-9))))
        ratios: list[float] = []
        for _ in range(ROUNDS):
            # Both in the same round, so that a machine that drifts drifts for both.
            seconds = [_turn(twin, velocities, x, mode, calls) for mode in ("submatrix", "mask")]
            ratios.append(seconds[0] / seconds[1])
            if max(ratios[0], 1 / ratios[0]) > CLEAR:
                break
    return "submatrix" if median(ratios) < 1 else "mask"


def faster_mode(chain: nn.Module, active: Sequence[BatchwiseDropout], x: Tensor, known: dict[Any, str]) -> str:
    """The faster mode for batches like `x`: from `known`, or measured on a copy and remembered there.

    Parameters, buffers, gradients and random states are as before.

    Args:
        chain: the container.
        active: its dropouts that drop anything.
        x: a batch.
        known: what was measured before.
    """
    key = _key(active, x)
    mode = known.get(key)
    if mode is None:
        mode = known[key] = _measure(chain, x)
    return mode
