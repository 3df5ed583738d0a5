"""Multiply the coordinates of a model's natural layers into their weights, for inference and for torch's layers."""

from __future__ import annotations

import warnings

from torch import nn

from batchlab.nn import NaturalLinear
from batchlab.nn.natural_coordinates import COLLECTED, COORDINATES
from batchlab.surgery.factored_apply import undone_on_exception
from batchlab.surgery.factored_plan import owners
from batchlab.surgery.wrappers import check_model

__all__ = ["merge_natural"]


def _why_not(layer: NaturalLinear, tied: dict[int, int]) -> str | None:
    if type(layer) is not NaturalLinear:
        return f"is a {type(layer).__name__}, a class of its own or parametrized"
    if "forward" in vars(layer):
        return "has a patched forward"
    if max(tied[id(p)] for p in layer.parameters(recurse=False)) > 1:
        return "shares v or d with another module, and would no longer"
    return None


def _merge(layer: NaturalLinear) -> None:
    """Make a natural layer torch's own; everything else on it stays."""
    merged = layer.merged()
    plain: nn.Module = layer
    plain.__class__ = nn.Linear
    rest = {name: value for name, value in plain._parameters.items() if name not in ("v", "d")}
    plain._parameters.clear()
    plain._parameters.update(merged._parameters | rest)
    for name in (*COORDINATES, *COLLECTED):
        del plain._buffers[name]
    for name in ("eps", "momentum", "update_statistics"):
        del vars(plain)[name]


def merge_natural(model: nn.Module) -> nn.Module:
    """Turn every natural layer into torch's own with W = V U and b = d - W c, in place; return the model.

    NaturalLinear   becomes   Linear, of the same function to rounding

    The layers stay the same objects, with their hooks and modes; weights and biases are new Parameters: build the
    optimizer afterwards. Layers that cannot be merged (subclasses, patched ones, tied parameters) stay, with one
    warning.

    Args:
        model: changed in place; on any exception it is as before.

    Raises:
        TypeError: the model is wrapped (DistributedDataParallel, torch.compile, ...) or scripted.
        ValueError: it has no natural layer that can be merged.

    >>> from batchlab.nn import NaturalLinear
    >>> merge_natural(NaturalLinear(4, 3))
    Linear(in_features=4, out_features=3, bias=True)
    """
    check_model(model, "merge_natural")
    tied = owners(model)
    merging: list[NaturalLinear] = []
    left = []
    for name, layer in model.named_modules():
        if isinstance(layer, NaturalLinear):
            reason = _why_not(layer, tied)
            if reason is None:
                merging.append(layer)
            else:
                left.append(f"\n  '{name}' {reason}")
    if not merging:
        there = f"; these cannot be:{''.join(left)}" if left else ""
        raise ValueError(f"{type(model).__name__} has no natural layer to merge{there}")
    with undone_on_exception(merging):
        for layer in merging:
            _merge(layer)
    if left:
        warnings.warn(f"merge_natural left these layers as they were:{''.join(left)}", stacklevel=2)
    return model
