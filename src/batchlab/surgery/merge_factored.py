"""Multiply the factors of a model's weights out, for inference and for code that needs torch's layers."""

from __future__ import annotations

import warnings

from torch import nn

from batchlab.nn.factored_layer import FactoredLayer
from batchlab.surgery.factored_apply import merge_in_place, undone_on_exception
from batchlab.surgery.factored_plan import FACTORED, owners
from batchlab.surgery.wrappers import check_model

__all__ = ["merge_factored"]


def _why_not(layer: FactoredLayer, tied: dict[int, int]) -> str | None:
    if type(layer) not in FACTORED.values():
        return f"is a {type(layer).__name__}, a class of its own or parametrized"
    if "forward" in vars(layer):
        return "has a patched forward"
    if max(tied[id(layer.v)], tied[id(layer.g)]) > 1:
        return "shares v or g with another module, and would no longer"
    return None


def merge_factored(model: nn.Module) -> nn.Module:
    """Turn every factored layer into torch's own with the effective weight, in place; return the model.

    FactoredLinear, FactoredConv1d, 2d, 3d   become   Linear, Conv1d, Conv2d, Conv3d, of the same function

    The layers stay the same objects, with their hooks, modes and biases; the weights are new Parameters: build the
    optimizer afterwards. The singular vectors of spectral_norm are taken as they are, as in evaluation. Layers that
    cannot be merged (subclasses, patched ones, tied factors) stay, with one warning.

    Args:
        model: changed in place; on any exception it is as before.

    Raises:
        TypeError: the model is wrapped (DistributedDataParallel, torch.compile, ...) or scripted.
        ValueError: it has no factored layer that can be merged.

    >>> from batchlab.nn import FactoredLinear
    >>> merge_factored(FactoredLinear(4, 3))
    Linear(in_features=4, out_features=3, bias=True)
    """
    check_model(model, "merge_factored")
    tied = owners(model)
    merging: list[FactoredLayer] = []
    left = []
    for name, layer in model.named_modules():
        if isinstance(layer, FactoredLayer):
            reason = _why_not(layer, tied)
            if reason is None:
                merging.append(layer)
            else:
                left.append(f"\n  '{name}' {reason}")
    if not merging:
        there = f"; these cannot be:{''.join(left)}" if left else ""
        raise ValueError(f"{type(model).__name__} has no factored layer to merge{there}")
    with undone_on_exception(merging):
        for layer in merging:
            merge_in_place(layer)
    if left:
        warnings.warn(f"merge_factored left these layers as they were:{''.join(left)}", stacklevel=2)
    return model
