"""How much memory a training step holds: counted tensor by tensor, or seen by the operating system."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Held", "held_for_backward", "peak_growth"]


@dataclass(frozen=True)
class Held:
    """Bytes that a forward pass leaves for the backward pass.

    Args:
        activations: in tensors with an entry for each sample: layers' inputs and outputs, masks.
        weights: in everything else: copies of kept weights, indices.
    """

    activations: int
    weights: int


class _Storages:
    """Bytes of storages, each counted once however many tensors look at it."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        # An address serves again once its owner is gone, so owners stay until the count is over.
        self.alive: list[Tensor] = []

    def count(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.seen:
            return 0
        self.seen.add(storage.data_ptr())
        self.alive.append(tensor)
        return storage.nbytes()


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors_in(item)] if isinstance(value, (list, tuple)) else []


def _on_contexts(root: Any) -> list[Tensor]:
    """Tensors that autograd functions written in Python keep as attributes, where no hook sees them."""
    found: list[Tensor] = []
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for value in getattr(node, "__dict__", {}).values():
            found += _tensors_in(value)
        waiting += [following for following, _ in node.next_functions]
    return found


def held_for_backward(forward: Callable[[], Tensor], known: Iterable[Tensor], batch_size: int) -> Held:
    """Bytes held between `forward` and the backward pass from its result, without those of `known` tensors.

    Counted are tensors saved for backward (each storage once), and tensors that autograd functions keep beside them.

    Args:
        forward: returns the loss.
        known: what is there anyway: parameters, buffers, the batch itself.
        batch_size: tensors whose first dimension has this size count as activations.
    """
    storages = _Storages(known)
    activations = weights = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal activations, weights
        if tensor.ndim and tensor.shape[0] == batch_size:
            activations += storages.count(tensor)
        else:
            weights += storages.count(tensor)
        return tensor

    with saved_tensors_hooks(add, lambda tensor: tensor):
        loss = forward()
    for tensor in _on_contexts(loss.grad_fn):
        add(tensor)
    return Held(activations, weights)


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def peak_growth(work: Callable[[], Any]) -> int | None:
    """By how many bytes this process's resident memory grew, at most, while `work` ran; None where no system tells.

    Whoever allocated it, it counts. Memory that was freed earlier and stayed with the process hides growth: for exact
    numbers call it once, in a fresh process. Linux only.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from what is now
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except OSError:
        return None
