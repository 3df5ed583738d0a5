"""Where Algorithm 2 puts normalizations: before which nonlinearities of a traced model, and why not before the rest."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import Tensor, fx, nn

from batchlab.surgery.dataflow import Dataflow, describe, input_of
from batchlab.surgery.example import Run
from batchlab.surgery.layers import Normalization, kind_of
from batchlab.surgery.nonlinearities import NONLINEAR_FUNCTIONS, NONLINEAR_METHODS, NONLINEAR_MODULES

__all__ = ["Insertion", "Plan", "plan_insertions"]


class Insertion(NamedTuple):
    """One normalization to come: after which layer, and flat in the layer's Sequential or with it in a new one."""

    layer: str
    flat: bool


class Plan(NamedTuple):
    """What to insert, what is left and why, and how many nonlinearities are normalized already."""

    insertions: list[Insertion]
    left: list[tuple[str, str]]
    normalized: int


def is_nonlinearity(node: fx.Node, model: nn.Module) -> bool:
    """Say whether a node is one of the nonlinearities that Algorithm 2 normalizes the input of."""
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), NONLINEAR_MODULES)
    if node.op == "call_method":
        return node.target in NONLINEAR_METHODS
    return node.op == "call_function" and node.target in NONLINEAR_FUNCTIONS


def _module(node: fx.Node | None, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def _before(node: fx.Node, model: nn.Module, passed: tuple[type[nn.Module], ...]) -> fx.Node | None:
    """Return what feeds `node`, looking through modules of the given types."""
    source = input_of(node)
    while isinstance(_module(source, model), passed) and source is not None:
        source = input_of(source)
    return source


def _why_not(
    source: fx.Node | None, user: fx.Node, model: nn.Module, flow: Dataflow, names: Counter[int], run: Run | None
) -> str | None:
    """Return the reason why no normalization can go between `source` and `user`, or None if one can."""
    if source is None:
        return "its input is not one tensor of the trace"
    layer = _module(source, model)
    kind = None if layer is None else kind_of(layer)
    if layer is None or kind is None:
        return f"its input comes from {describe(source, model)}, not from a linear or convolution layer"
    name, what = str(source.target), describe(source, model)
    calls = max(len(flow.calls(name)), run.calls.get(name, 0) if run is not None else 0)
    if calls > 1:
        return f"{what} is called {calls} times"
    if names[id(layer)] > 1:
        return f"{what} is registered under {names[id(layer)]} names"
    while source is not user:
        if len(source.users) > 1:
            return f"the output of {describe(source, model)} is used {len(source.users)} times"
        source = next(iter(source.users))
    if flow.reads(name):
        return f"the forward also reads the parameters of {what} directly"
    if isinstance(layer.weight, Tensor) and not layer.weight.is_floating_point():
        return f"{what} has {layer.weight.dtype} weights"
    dimensions = None if run is None else run.dimensions.get(name)
    if dimensions is not None and dimensions != kind.spatial + 2:
        needed = "(N, features)" if kind.spatial == 0 else f"a batch, {kind.spatial + 2} dimensions"
        return f"{what} gets an input of {dimensions} dimensions, and normalizing its output needs {needed}"
    return None


def _is_flat(layer: str, user: fx.Node, model: nn.Module, flow: Dataflow) -> bool:
    """Say whether layer and nonlinearity are neighbours in a Sequential that runs them as such."""
    parent_name, _, key = layer.rpartition(".")
    parent, activation = model.get_submodule(parent_name), _module(user, model)
    if type(parent) is not nn.Sequential or (parent_name and parent_name not in flow.entered):
        return False  # iterated over or indexed by its owner: its length and numbers may matter there
    children = list(parent._modules.items())
    position = [name for name, _ in children].index(key) + 1
    return activation is not None and position < len(children) and children[position][1] is activation


def plan_insertions(model: nn.Module, flow: Dataflow, run: Run | None) -> Plan:
    """Decide for each nonlinearity of a traced model; `run` is what an example showed, if there was one."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    plan = Plan([], [], 0)
    normalized = 0
    for node in flow.graph.nodes:
        module = _module(node, model)
        if isinstance(module, Normalization) and getattr(module, "activation", None) is not None:
            normalized += 1
        if not is_nonlinearity(node, model):
            continue
        if isinstance(_module(_before(node, model, (nn.Identity, nn.Dropout)), model), Normalization):
            normalized += 1
            continue
        source = _before(node, model, (nn.Identity,))
        reason = _why_not(source, node, model, flow, names, run)
        if reason is None and source is not None:
            name = str(source.target)
            plan.insertions.append(Insertion(name, _is_flat(name, node, model, flow)))
        else:
            plan.left.append((describe(node, model), str(reason)))
    return plan._replace(normalized=normalized)
