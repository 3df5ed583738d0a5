"""Where the features are in the input of a dropout: decided by the layers that the data flow has next to it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from batchlab.nn import BatchwiseDropout
from batchlab.surgery.dataflow import Dataflow
from batchlab.surgery.layers import Norm, kind_of
from batchlab.surgery.nonlinearities import NONLINEAR_FUNCTIONS, NONLINEAR_METHODS, NONLINEAR_MODULES

__all__ = ["STOCK", "CannotPlaceError", "View", "feature_dim"]

STOCK: Final[dict[type[nn.Module], int | None]] = {nn.Dropout: None, nn.Dropout1d: 3, nn.Dropout2d: 4, nn.Dropout3d: 5}
"""Torch's dropouts that drop to zero, and how many dimensions a batch of theirs has; None: any number."""

SECOND: Final = (Norm, _InstanceNorm, nn.GroupNorm)
LAST: Final = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.RMSNorm, nn.RNNBase, nn.MultiheadAttention),
    *(nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer),
)
POOLINGS: Final = (_MaxPoolNd, _AvgPoolNd, _AdaptiveMaxPoolNd, _AdaptiveAvgPoolNd)
STAY: Final = (*NONLINEAR_MODULES, *POOLINGS, nn.Identity, _DropoutNd, BatchwiseDropout)
"""Modules that leave features in the dimension in which they are."""

ARITHMETIC: Final[frozenset[Callable[..., Any]]] = frozenset(
    [operator.add, operator.sub, operator.mul, operator.iadd, operator.imul, torch.add, torch.sub, torch.mul]
)
ARITHMETIC_METHODS: Final = frozenset(["add", "add_", "sub", "mul", "mul_", "contiguous"])


class CannotPlaceError(ValueError):
    """It is not clear where a dropout's features are; the message says why."""


class View(NamedTuple):
    """A traced module, and its name in the model."""

    prefix: str
    module: nn.Module
    flow: Dataflow

    def calls(self, name: str) -> list[fx.Node]:
        """Every call of the model's module `name` in this trace."""
        if self.prefix and not name.startswith(f"{self.prefix}."):
            return []
        return self.flow.calls(name[len(self.prefix) + 1 :] if self.prefix else name)


def _told_by(module: nn.Module, ndim: int) -> int | None:
    """The feature dimension of what a layer puts out (or takes) in `ndim` dimensions, if its type tells."""
    kind = kind_of(module)
    if kind is not None and kind.spatial:
        return ndim - 1 - kind.spatial  # 0 without a batch
    if isinstance(module, SECOND):
        return 1
    if isinstance(module, LAST) or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1):
        return -1
    return None


def _stays(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, STAY)
    if node.op == "call_method":
        return node.target in NONLINEAR_METHODS or node.target in ARITHMETIC_METHODS
    first = node.target is operator.getitem and node.args[1:] == (0,)  # what an LSTM or attention puts out first
    return first or (node.op == "call_function" and (node.target in NONLINEAR_FUNCTIONS or node.target in ARITHMETIC))


def _look(view: View, start: Iterable[fx.Node], ndim: int, onward: Callable[[fx.Node], Iterable[fx.Node]]) -> set[int]:
    """What the nearest layers in one direction tell."""
    told: set[int] = set()
    waiting, seen = list(start), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        module = view.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        dim = None if module is None else _told_by(module, ndim)
        if dim is not None:
            told.add(dim)
        elif _stays(node, module):
            waiting += onward(node)
    return told


def _from_neighbours(name: str, views: list[View], ndim: int) -> set[int]:
    """Every answer that the layers before the dropout's calls give; for calls without one, those behind."""
    told: set[int] = set()
    for view in views:
        for call in view.calls(name):
            told |= _look(view, call.all_input_nodes, ndim, lambda node: node.all_input_nodes) or _look(
                view, call.users, ndim, lambda node: node.users
            )
    return told


def feature_dim(name: str, module: nn.Module, dimensions: set[int | None], views: list[View]) -> int:
    """The `dim` of the BatchwiseDropout that takes a stock dropout's place.

    Args:
        name: of the dropout.
        module: the dropout.
        dimensions: numbers of dimensions of its inputs, as seen.
        views: traces to look for neighbours in; may be empty.

    Raises:
        CannotPlaceError: inputs of different numbers of dimensions, without a batch, or with features that may be in
            more than one place.
    """
    if len(dimensions) != 1 or None in dimensions:
        numbers = " and ".join(sorted(str(number) for number in dimensions))
        raise CannotPlaceError(f"it gets inputs of {numbers} dimensions; use a dropout of its own in each place")
    ndim = next(number for number in dimensions if number is not None)
    expected = STOCK[type(module)]
    if expected is not None and ndim != expected:
        raise CannotPlaceError(f"its input has {ndim} dimensions, and a batch for it has {expected}")
    if ndim < 2:
        raise CannotPlaceError(f"its input has {ndim} dimensions; give an example with a batch dimension")
    if expected is not None:
        return 1
    told = _from_neighbours(name, views, ndim)
    if told == {0}:
        raise CannotPlaceError(f"its input has {ndim} dimensions and no batch; give an example with a batch dimension")
    if ndim == 2:
        return 1
    if len(told) != 1:
        places = "the layers next to it disagree" if told else "no layer next to it tells (Linear: the last, Conv: 1)"
        raise CannotPlaceError(f"its input has {ndim} dimensions, and which has the features is not clear: {places}")
    return told.pop()
