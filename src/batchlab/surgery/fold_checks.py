"""Which modules may be folded at all: known, used once, shared with nobody, and watched by nobody."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import fx, nn
from torch.nn.utils import parametrize

from batchlab.surgery.dataflow import Dataflow, input_of
from batchlab.surgery.example import Run
from batchlab.surgery.layers import NORMS, ChannelNorm, exact_kind, has_statistics, is_linear_or_conv, own_type

__all__ = ["Usage", "find_usage", "has_hooks", "why_not_layer", "why_not_norm"]


class Usage(NamedTuple):
    """How a model uses its modules and parameters.

    Attributes:
        flow: the traced model.
        run: what running the example showed.
        names: how many names each module has, by id.
        holders: how many modules hold each parameter, by id.
    """

    flow: Dataflow
    run: Run
    names: Counter[int]
    holders: Counter[int]


def find_usage(model: nn.Module, flow: Dataflow, run: Run) -> Usage:
    """Count names and holders."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return Usage(flow, run, names, holders)


def has_hooks(module: nn.Module) -> bool:
    """Say whether something looks at, or changes, what goes in and out of `module`."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def _why_not_module(name: str, module: nn.Module, usage: Usage) -> str | None:
    if parametrize.is_parametrized(module):
        return "is parametrized (torch.nn.utils.parametrize.remove_parametrizations makes it plain)"
    if has_hooks(module):
        return "has forward hooks (weight_norm, spectral_norm and prune set some), or a forward of its own"
    if usage.names[id(module)] > 1:
        return f"is shared: the model has it under {usage.names[id(module)]} names"
    traced, seen = len(usage.flow.calls(name)), usage.run.calls.get(name, 0)
    if traced != 1 or seen != 1:
        if traced == seen == 0:
            return "is not called"
        if traced == seen:
            return f"is called {traced} times"
        return f"is called {seen} times, of which the trace shows {traced}"
    if any(usage.holders[id(p)] > 1 for p in module._parameters.values() if p is not None):
        return "shares a parameter with another module"
    if usage.flow.reads(name):
        return "has parameters or buffers that the forward also reads directly"
    return None


def why_not_layer(name: str, layer: nn.Module, usage: Usage) -> str | None:
    """Return why this linear or convolution layer cannot take a normalization in; None if it can."""
    reason = _why_not_module(name, layer, usage)
    if reason is None and exact_kind(layer) is None:
        known = next(c.__name__ for c in type(layer).__mro__ if c.__module__.startswith("torch.nn"))
        reason = f"is a {type(layer).__name__}, which extends {known} in ways that are not known"
    if reason is None and not layer.weight.is_floating_point():  # type: ignore[operator]
        reason = "has weights that are not real numbers"
    return None if reason is None else f"{type(layer).__name__} '{name}' {reason}"


def why_not_norm(name: str, norm: ChannelNorm, usage: Usage) -> str | None:
    """Return why this normalization cannot become part of any layer; None if that is for the layer to say."""
    reason = _why_not_module(name, norm, usage)
    if reason is not None:
        return f"it {reason}"
    if own_type(norm) not in NORMS:
        return f"it is a {type(norm).__name__}, which extends batch normalization in ways that are not known"
    if not has_statistics(norm):
        return "it has no running statistics"
    if norm.training or getattr(norm, "statistics", "auto") == "batch":
        return "it normalizes with the statistics of the batch in evaluation too"
    node = usage.flow.calls(name)[0]
    if input_of(node) is None:
        return "its input is not one tensor of the trace"
    given = [f"{key}=" for key in node.kwargs if key != "input"]  # what takes its place knows no other argument
    return f"it is called with {', '.join(given)}" if given else None


def is_layer(node: fx.Node, model: nn.Module) -> bool:
    """Say whether a node calls a linear or convolution layer."""
    return node.op == "call_module" and is_linear_or_conv(model.get_submodule(str(node.target)))
