"""Which normalization goes into which layer, in what order, and what the layers' weights then are."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from batchlab.surgery.fold_algebra import (
    CannotFoldError,
    Weights,
    fold_after,
    fold_before,
    groups_of,
    is_pointwise,
    scale_and_shift,
    weights_of,
    zero_padding,
)
from batchlab.surgery.fold_checks import Usage, why_not_layer, why_not_norm
from batchlab.surgery.fold_paths import layer_after, layer_before
from batchlab.surgery.layers import ChannelNorm, LayerKind, exact_kind

__all__ = ["AFTER", "BEFORE", "FoldPlan", "Step", "plan_folds"]

BEFORE, AFTER = "into the layer before", "into the layer after"


class Step(NamedTuple):
    """One normalization that becomes part of a layer."""

    norm: str
    layer: str
    where: str


class FoldPlan(NamedTuple):
    """The steps, the layers' new weights in float64, and why the other normalizations stay."""

    steps: list[Step]
    weights: dict[str, Weights]
    refused: dict[str, str]


def _check_dimensions(names: tuple[str, str], kind: LayerKind, usage: Usage) -> None:
    needed = kind.spatial + 2
    for name in names:
        seen = usage.run.dimensions.get(name)
        if seen != needed:
            layout = "(N, features): with more, a normalization works on dimension 1 and a linear layer on the last"
            batch = f"a batch, {needed} dimensions"
            raise CannotFoldError(
                f"'{name}' gets an input of {seen} dimensions; folding needs {batch if kind.spatial else layout}"
            )


def _check_representable(weights: Weights, dtype: torch.dtype) -> None:
    values: list[Tensor] = [v for v in weights if v is not None]
    if not all(value.to(dtype).isfinite().all() for value in values):
        raise CannotFoldError(f"the folded weights do not fit into {dtype}")


def _fold(norm: ChannelNorm, name: str, layer: nn.Module, weights: Weights, where: str) -> Weights:
    kind, groups = exact_kind(layer), groups_of(layer)
    if kind is None:
        raise CannotFoldError(f"{type(layer).__name__} '{name}' is not a layer that is known")
    scale, shift = scale_and_shift(norm)
    if where == BEFORE:
        folded = fold_after(weights, scale, shift, kind, groups)
    else:
        if getattr(norm, "activation", None) is not None:
            raise CannotFoldError(f"its activation {norm.activation!r} stands between it and the layer after it")
        pads = any(zero_padding(layer, kind))
        pointwise = kind.transposed and is_pointwise(layer)
        folded = fold_before(weights, scale, shift, kind, groups, pads=pads, pointwise=pointwise)
    _check_representable(folded, layer.weight.dtype)  # type: ignore[arg-type]
    return folded


def plan_folds(model: nn.Module, usage: Usage, allowed: Collection[str] | None = None) -> FoldPlan:
    """Decide for every normalization of a model in evaluation mode; with `allowed`, for these only.

    First, in the order of the calls, into the layers before; then, in reverse, into the layers after. What has been
    folded counts as gone, so chains of normalizations fold as far as they can.
    """
    plan = FoldPlan([], {}, {})
    norms = {name: module for name, module in model.named_modules() if isinstance(module, ChannelNorm)}
    gone: set[str] = set()

    def attempt(name: str, find: Callable[[fx.Node, nn.Module, set[str]], fx.Node], where: str) -> str | None:
        try:
            target = str(find(usage.flow.calls(name)[0], model, gone).target)
            layer = model.get_submodule(target)
            reason = why_not_layer(target, layer, usage)
            kind = exact_kind(layer)
            if reason is not None or kind is None:
                return reason
            _check_dimensions((name, target), kind, usage)
            weights = plan.weights.get(target) or weights_of(layer, kind)
            plan.weights[target] = _fold(norms[name], target, layer, weights, where)
        except CannotFoldError as error:
            return str(error)
        plan.steps.append(Step(name, target, where))
        if getattr(norms[name], "activation", None) is None:
            gone.add(name)
        return None

    waiting: set[str] = set()
    for name, norm in norms.items():
        reason = why_not_norm(name, norm, usage)
        if reason is not None:
            plan.refused[name] = reason
        elif allowed is None or name in allowed:
            waiting.add(name)
    order = [n.target for n in usage.flow.graph.nodes if n.op == "call_module" and n.target in waiting]
    tried = {name: attempt(name, layer_before, BEFORE) for name in order}
    for name in reversed([name for name in order if tried[name] is not None]):
        reason = attempt(name, layer_after, AFTER)
        if reason is not None:
            plan.refused[name] = f"before: {tried[name]}; after: {reason}"
    return plan
