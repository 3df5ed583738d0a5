"""Which rectifier and which dropout stand in front of a layer or behind it, in a traced model."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from batchlab.nn import BatchwiseDropout, UniformDropout
from batchlab.reference.variance_shift import uniform_second_moment
from batchlab.surgery.dataflow import describe, input_of
from batchlab.surgery.dropout_dims import POOLINGS
from batchlab.surgery.layers import Normalization
from batchlab.surgery.nonlinearities import NONLINEAR_FUNCTIONS, NONLINEAR_METHODS, NONLINEAR_MODULES

__all__ = ["Neighbour", "behind", "in_front"]

LIKE_RELU: Final = (nn.ReLU, nn.ReLU6, nn.ELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus)
"""ReLU, and what comes close to it: their negative side is nearly flat."""

LIKE_RELU_FUNCTIONS: Final[frozenset[Callable[..., Any]]] = frozenset(
    [
        *(F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.elu, F.elu_, F.celu, F.celu_, torch.celu, torch.celu_),
        *(F.gelu, F.silu, F.mish, F.hardswish, F.softplus),
    ]
)
LEAKY_FUNCTIONS: Final[frozenset[Callable[..., Any]]] = frozenset([F.leaky_relu, F.leaky_relu_])
RANDOM_FUNCTIONS: Final[frozenset[Callable[..., Any]]] = frozenset([F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_])
DROPOUT_FUNCTIONS: Final[frozenset[Callable[..., Any]]] = frozenset(
    [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout]
)
ACTIVATION_SLOPES: Final = {"relu": 0.0, "leaky_relu": 0.01, "silu": 0.0, "sigmoid": 1.0}

PASSING_MODULES: Final = (*POOLINGS, nn.Identity, nn.Flatten, nn.Unflatten, nn.AlphaDropout, nn.FeatureAlphaDropout)
PASSING_FUNCTIONS: Final[frozenset[Callable[..., Any]]] = frozenset(
    [
        *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.mean),
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        *(F.alpha_dropout, F.feature_alpha_dropout),
    ]
)
ADDITIONS: Final[frozenset[Callable[..., Any]]] = frozenset(
    [operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub]
)
ADDITION_METHODS: Final = frozenset(["add", "add_", "sub", "sub_"])
PASSING_METHODS: Final = frozenset(
    ["view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone", "mean"]
)


class Neighbour(NamedTuple):
    """What a layer has on one side.

    Attributes:
        slope: of the rectifier's negative side; 1 where there is none.
        keep: what the dropouts on the way keep, multiplied.
        what: in words.
    """

    slope: float
    keep: float
    what: str


def _module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _root_mean_square(slopes: Any) -> float:
    return math.sqrt(slopes.detach().double().square().mean().item()) if isinstance(slopes, Tensor) else 0.25


def _of_a_range(lower: float, upper: float) -> float:
    """√E[a²] for a uniform in a range: what a random slope counts as."""
    return math.sqrt((lower**2 + lower * upper + upper**2) / 3)


def _module_slope(module: nn.Module) -> float | None:
    if isinstance(module, Normalization):
        return ACTIVATION_SLOPES.get(str(getattr(module, "activation", None)))
    if isinstance(module, nn.LeakyReLU):
        return float(module.negative_slope)
    if isinstance(module, nn.PReLU):
        return _root_mean_square(module.weight)
    if isinstance(module, nn.RReLU):
        return _of_a_range(module.lower, module.upper)
    if isinstance(module, LIKE_RELU):
        return 0.0
    return 1.0 if isinstance(module, NONLINEAR_MODULES) else None


def _attribute(node: Any, root: nn.Module) -> Any:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _slope(node: fx.Node, root: nn.Module) -> float | None:
    """The slope that a nonlinearity counts as; None for anything else."""
    module = _module(node, root)
    if module is not None:
        return _module_slope(module)
    if node.op == "call_method":
        if node.target == "prelu":
            return _root_mean_square(_attribute(_argument(node, 1, "weight", None), root))
        return None if node.target not in NONLINEAR_METHODS else 0.0 if str(node.target).startswith("relu") else 1.0
    if node.op != "call_function" or node.target not in NONLINEAR_FUNCTIONS:
        return None
    if node.target in LEAKY_FUNCTIONS:
        return float(_argument(node, 1, "negative_slope", 0.01))
    if node.target in RANDOM_FUNCTIONS:
        return _of_a_range(_argument(node, 1, "lower", 1 / 8), _argument(node, 2, "upper", 1 / 3))
    if node.target in (F.prelu, torch.prelu):
        return _root_mean_square(_attribute(_argument(node, 1, "weight", None), root))
    return 0.0 if node.target in LIKE_RELU_FUNCTIONS else 1.0


def _keep(node: fx.Node, root: nn.Module) -> float | None:
    """1 / E[noise²] of a dropout; None for anything else. One that drops everything has nothing to make up for."""
    module = _module(node, root)
    if isinstance(module, UniformDropout):
        return 1 / uniform_second_moment(module.beta)
    p: Any = None
    if isinstance(module, (_DropoutNd, BatchwiseDropout)) and not isinstance(module, PASSING_MODULES):
        p = module.p
    elif node.op == "call_function" and node.target in DROPOUT_FUNCTIONS:
        named = "train" if node.target in (torch.dropout, torch.feature_dropout) else "training"
        p = _argument(node, 1, "p", 0.5) if _argument(node, 2, named, True) is True else 0.0
    if not isinstance(p, (int, float)):
        return None
    return 1 - p if p < 1 else 1.0


def _passes(node: fx.Node, root: nn.Module) -> bool:
    module = _module(node, root)
    if module is not None:
        return isinstance(module, PASSING_MODULES)
    return node.target in (PASSING_METHODS if node.op == "call_method" else PASSING_FUNCTIONS)


def in_front(layer: fx.Node, root: nn.Module, path: str) -> Neighbour:
    """What the input of a layer has gone through since the layer or normalization before it.

    Args:
        layer: a call in a trace of `root`.
        root: what was traced.
        path: its name in the model, for the words.
    """
    keep, slope, words = 1.0, None, ""
    node = input_of(layer)
    while node is not None:
        kept = _keep(node, root)
        if kept is not None:
            keep *= kept
        elif slope is None and _slope(node, root) is not None:
            slope, words = _slope(node, root), f"behind {describe(node, root)}"
            if slope == 1 or isinstance(_module(node, root), Normalization):
                break  # a dropout in front of what is no rectifier is not a factor behind it
        elif not _passes(node, root):
            break
        node = input_of(node)
    if slope is not None:
        return Neighbour(slope, keep, words)
    if node is None:
        return Neighbour(1.0, keep, "its input is not one tensor of the trace")
    if node.op == "placeholder":
        return Neighbour(1.0, keep, f"first behind the input of {path!r}" if path else "first behind the model's input")
    return Neighbour(1.0, keep, f"behind {describe(node, root)}, no nonlinearity between")


def _passes_gradients(node: fx.Node, root: nn.Module) -> bool:
    """Whether a gradient goes through a node as it is, apart from a normalization's scale."""
    added = node.target in (ADDITION_METHODS if node.op == "call_method" else ADDITIONS)
    return (
        added or isinstance(_module(node, root), Normalization) or _passes(node, root) or _keep(node, root) is not None
    )


def _beyond(layer: fx.Node, root: nn.Module) -> Iterator[tuple[float, str]]:
    """The slope at the end of each way on from a layer."""
    waiting, seen = list(layer.users), set[fx.Node]()
    while waiting:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        slope = _slope(node, root)
        if slope is not None:
            yield slope, f"in front of {describe(node, root)}"
        elif node.op == "output":
            yield 1.0, "last in front of the output"
        elif _passes_gradients(node, root):
            waiting += node.users
        else:
            yield 1.0, f"in front of {describe(node, root)}, no nonlinearity between"


def behind(layer: fx.Node, root: nn.Module) -> Neighbour:
    """What the output of a layer goes through up to the next layer, normalizations included."""
    found = list(dict.fromkeys(_beyond(layer, root)))
    if len({slope for slope, _ in found}) == 1:
        return Neighbour(found[0][0], 1.0, found[0][1])
    where = "; ".join(words for _, words in found) or "nothing"
    return Neighbour(1.0, 1.0, f"used in several ways: {where}" if found else "its output is not used")
