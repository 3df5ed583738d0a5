"""Put the linear layers of a model that exists into natural coordinates (Desjardins et al. 2015, PRONG)."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Final

from torch import nn
from torch.nn.utils import parametrize

from batchlab.nn import NaturalLinear
from batchlab.nn.natural_coordinates import COLLECTED, COORDINATES, check_natural
from batchlab.surgery.factored_apply import undone_on_exception
from batchlab.surgery.factored_plan import Select, names_by_module, owners
from batchlab.surgery.wrappers import check_model

__all__ = ["to_natural"]

OWN_NAMES: Final = ("v", "d", *COORDINATES, *COLLECTED, "eps", "momentum", "update_statistics", "merged", "refresh")


def _why_not(layer: nn.Linear, tied: Counter[int]) -> str | None:
    if parametrize.is_parametrized(layer):
        return "is parametrized: torch.nn.utils.parametrize.remove_parametrizations first"
    if type(layer) is not nn.Linear:
        return f"is a {type(layer).__name__}, a class of its own that may use its weight in another way"
    if "forward" in vars(layer):
        return "has a patched forward"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "has no parameter 'weight': a hook computes it (weight_norm, spectral_norm, prune); remove that first"
    if not weight.is_floating_point() or weight.numel() == 0:
        return f"has {weight.dtype} weights of shape {tuple(weight.shape)}"
    taken = [name for name in OWN_NAMES if hasattr(layer, name)]
    if taken:
        return f"has an attribute {taken[0]!r} already"
    if max(tied[id(p)] for p in layer.parameters(recurse=False)) > 1:
        return "shares its weight or bias with another module, which a refresh would change"
    return None


def _convert(layer: nn.Module, eps: float, momentum: float | None) -> None:
    """Make a stock layer a natural one; everything else on it stays, gradients too, which are the same where U = I."""
    own = {"v": layer._parameters.pop("weight"), "d": layer._parameters.pop("bias")}
    rest = dict(layer._parameters)
    layer._parameters.clear()
    layer._parameters.update(own | rest)
    layer.__class__ = NaturalLinear
    if isinstance(layer, NaturalLinear):
        layer._start(eps, momentum)


def to_natural(
    model: nn.Module, *, select: Select | None = None, eps: float = 1e-3, momentum: float | None = 1.0
) -> nn.Module:
    """Turn a model's linear layers into natural ones, in place; return the model.

    Linear   becomes   NaturalLinear with U = I and c = 0, of the same function, to the last bit for finite inputs

    The layers are the same objects under the same names, and V and d are the Parameters that weight and bias were, with
    their gradients: an optimizer that exists goes on. State-dict keys change from `weight` and `bias` to `v` and `d`;
    checkpoints from before load nevertheless. Convolutions stay as they are. Linear layers that cannot be converted
    (subclasses, parametrizations, patched layers, weights tied to another module) stay too, with one warning that says
    why. Applied twice is applied once. `batchlab.optim.NaturalRefresh` does the rest, during training.

    Args:
        model: changed in place; on any exception it is as before.
        select: says of a name and a layer whether to convert it; None: all. A layer with several names is converted
            if one of them is selected.
        eps: see `batchlab.nn.NaturalLinear`.
        momentum: see `batchlab.nn.NaturalLinear`.

    Raises:
        TypeError: the model is wrapped (DistributedDataParallel, torch.compile, ...) or scripted.
        ValueError: no layer to convert, an option out of its range, or a lazy parameter.

    Source: Desjardins et al. 2015, section 3.

    >>> from torch import nn
    >>> to_natural(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), select=lambda name, _: name == "0")
    Sequential(
      (0): NaturalLinear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    check_model(model, "to_natural")
    check_natural(eps, momentum)
    tied = owners(model)
    converting: list[nn.Linear] = []
    already, left = 0, []
    for layer, names in names_by_module(model).items():
        if not isinstance(layer, nn.Linear) or not (select is None or any(select(name, layer) for name in names)):
            continue
        if isinstance(layer, NaturalLinear):
            already += 1
            continue
        reason = _why_not(layer, tied)
        if reason is None:
            converting.append(layer)
        else:
            left.append(f"\n  '{names[0]}' {reason}")
    if not converting and not already:
        chosen = "" if select is None else " that select chooses"
        there = f"; these cannot be:{''.join(left)}" if left else ""
        raise ValueError(f"{type(model).__name__} has no linear layer to convert{chosen}{there}")
    with undone_on_exception(converting):
        for layer in converting:
            _convert(layer, eps, momentum)
    if left:
        warnings.warn(f"to_natural left these layers as they were:{''.join(left)}", stacklevel=2)
    return model
