"""Which layers `initialize` gives new weights, of which variance, and why not the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from batchlab.nn.running_statistics import RunningStatistics
from batchlab.reference import initialization as reference
from batchlab.surgery.dataflow import is_leaf, trace
from batchlab.surgery.initialization_report import InitializationEntry
from batchlab.surgery.layers import exact_kind
from batchlab.surgery.rectifiers import Neighbour, behind, in_front

__all__ = ["Plan", "plan_initialization"]

NO_WEIGHTS: Final[tuple[type[nn.Module], ...]] = (
    *(_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU),
    RunningStatistics,
)


class Plan(NamedTuple):
    """Every layer with weights: what to do, and what `nn.init` is to be told where it gets new ones."""

    entries: list[InitializationEntry]
    options: dict[str, dict[str, Any]]


class _Call(NamedTuple):
    """A layer's call in the trace of a part of the model."""

    node: fx.Node
    root: nn.Module
    path: str
    calls: int


def _holds_weights(module: nn.Module) -> bool:
    if isinstance(module, (*NO_WEIGHTS, parametrize.ParametrizationList)):
        return False
    return exact_kind(module) is not None or any(p.ndim >= 2 for p in module.parameters(recurse=False))


def _why_not(name: str, module: nn.Module, users: dict[int, list[str]]) -> str | None:
    """Return why a layer cannot get new weights, or None if it can."""
    if exact_kind(module) is None:
        return f"a {type(module).__name__} is not one of torch's linear or convolution layers"
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        return "its weight is computed from other tensors: initialize those"
    if not weight.is_floating_point():
        return f"its weights are {weight.dtype}"
    if not weight.requires_grad:
        return "its weight is frozen (requires_grad=False)"
    others = [other for other in users[id(weight)] if other != name]
    if others and users[id(weight)][0] != name:
        return f"its weight is that of '{others[0]}'"
    return None


def _weight_users(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter; those that are not layers of a known class first."""
    users: dict[int, list[str]] = {}
    for known in (False, True):
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                if (exact_kind(module) is not None) is known:
                    users.setdefault(id(parameter), []).append(name)
    return users


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, then its containers from outside to inside."""
    for name, module in model.named_modules():
        if not is_leaf(module) and next(module.children(), None) is not None:
            yield name, module


def _find_calls(model: nn.Module, wanted: set[str]) -> dict[str, _Call]:
    """The first call of each layer, in the trace of the outermost part that can be traced."""
    calls: dict[str, _Call] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for path, part in _parts(model):
        waiting = [name for name in wanted - calls.keys() if not path or name.startswith(f"{path}.")]
        if not waiting:
            continue
        with contextlib.suppress(ValueError):
            flow = trace(part, None, training=True, way_out="")
            nodes: dict[str, list[fx.Node]] = {}
            for node in flow.graph.nodes:
                if node.op == "call_module":  # a shared layer may be called under another of its names
                    nodes.setdefault(names[id(part.get_submodule(str(node.target)))], []).append(node)
            for name in waiting:
                if name in nodes:
                    calls[name] = _Call(nodes[name][0], part, path, len(nodes[name]))
    return calls


def _neighbours(call: _Call | None, mode: str) -> Neighbour:
    if call is None:  # the model is the layer
        return Neighbour(1.0, 1.0, "the model's only layer")
    front = in_front(call.node, call.root, call.path)
    found = front if mode == "forward" else behind(call.node, call.root)._replace(keep=front.keep)
    several = f"; the first of {call.calls} calls" if call.calls > 1 else ""
    return found._replace(what=found.what + several)


def plan_initialization(model: nn.Module, scheme: str, mode: str) -> Plan:
    """Decide for each layer with weights."""
    users = _weight_users(model)
    layers = {name: module for name, module in model.named_modules() if _holds_weights(module)}
    reasons = {name: _why_not(name, module, users) for name, module in layers.items()}
    calls = _find_calls(model, {name for name, reason in reasons.items() if reason is None and name})
    plan = Plan([], {})
    for name, module in layers.items():
        reason = reasons[name]
        if reason is None and name and name not in calls:
            reason = "no trace of the model or of a part of it calls the layer: use batchlab.nn.init"
        weight, kind = module._parameters.get("weight"), exact_kind(module)
        if reason is not None or not isinstance(weight, Tensor) or kind is None:
            plan.entries.append(InitializationEntry(name, "left", None, None, None, None, str(reason)))
            continue
        found = _neighbours(calls.get(name), mode)
        slope = found.slope if scheme == "he" else 1.0
        shape: dict[str, Any] = {"groups": 1, "transposed": kind.transposed, "stride": ()}
        if kind.spatial:
            shape |= {"groups": module.groups, "stride": module.stride}
        terms = reference.terms(weight.shape, mode, **shape)
        std = reference.weight_variance(terms, slope, found.keep) ** 0.5 if terms else 0.0
        plan.options[name] = {"negative_slope": slope, "keep": found.keep, "mode": mode, **shape}
        plan.entries.append(InitializationEntry(name, "initialized", slope, found.keep, terms, std, found.what))
    return plan
