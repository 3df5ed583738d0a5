"""Which layers of a model can be factored, with which factors, and why the others cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm

from batchlab.functional import factor_weight
from batchlab.nn import FactoredConv1d, FactoredConv2d, FactoredConv3d, FactoredLinear
from batchlab.nn.factored_layer import FactoredLayer
from batchlab.reference.batch_norm import statistics_dtype
from batchlab.reference.factored import CENTERED, gain_shape
from batchlab.surgery.layers import exact_kind, is_linear_or_conv, own_type

__all__ = ["FACTORED", "Conversion", "Plan", "Select", "names_by_module", "owners", "plan_factoring"]

FACTORED: Final[dict[type[nn.Module], type[FactoredLayer]]] = {
    cls.stock: cls for cls in (FactoredLinear, FactoredConv1d, FactoredConv2d, FactoredConv3d)
}
OWN_NAMES: Final = ("g", "v", "left", "right", "factorization", "eps", "set_weight", "initialize", "merged")

Select = Callable[[str, nn.Module], bool]


class Conversion(NamedTuple):
    """One layer to factor: under its first name, with the parameters and buffers that it gets."""

    name: str
    layer: nn.Module
    v: nn.Parameter
    g: nn.Parameter
    left: Tensor | None
    right: Tensor | None


class Plan(NamedTuple):
    """What to factor, the names of layers that are factored already, and what is left and why."""

    conversions: list[Conversion]
    already: list[str]
    left: list[tuple[str, str]]


def names_by_module(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all the names that it goes by, in order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def owners(model: nn.Module) -> Counter[int]:
    """How many attributes of the model's modules each parameter is, by id; more than one: it is tied."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def _why_not(layer: nn.Module, factorization: str) -> str | None:
    """Return the reason why a layer that is not parametrized cannot be factored, or None."""
    kind = exact_kind(layer)
    weight = layer._parameters.get("weight")
    if kind is None:
        return f"is a {own_type(layer).__name__}, a class of its own that may use its weight in another way"
    if kind.transposed:
        return "is transposed, and there is no transposed factored layer"
    if "forward" in vars(layer):
        return "has a patched forward"
    taken = [name for name in OWN_NAMES if hasattr(layer, name)]
    if taken:
        return f"has an attribute {taken[0]!r} already"
    if weight is None and not parametrize.is_parametrized(layer):
        return (
            "has no parameter 'weight': a hook computes it (torch.nn.utils.weight_norm, spectral_norm, prune); "
            "remove that first"
        )
    if weight is not None and not weight.is_floating_point():
        return f"has {weight.dtype} weights"
    if factorization in CENTERED and weight is not None and math.prod(weight.shape[1:]) == 1:
        return f"has one weight per unit, and {factorization} would subtract it from itself"
    return None


def _from_parametrization(name: str, layer: nn.Module, factorization: str) -> Conversion | str:
    """The factors of torch's weight_norm and spectral_norm, as the same objects; or why the layer is left."""
    lists: Any = layer.parametrizations
    steps = list(lists["weight"]) if list(lists) == ["weight"] else []
    step = steps[0] if len(steps) == 1 else None
    if factorization == "weight_norm" and isinstance(step, _WeightNorm) and step.dim == 0:
        return Conversion(name, layer, lists.weight.original1, lists.weight.original0, None, None)
    single = isinstance(step, _SpectralNorm) and step.dim == 0 and step.n_power_iterations == 1
    if factorization == "spectral_norm" and single:
        v: nn.Parameter = lists.weight.original
        g = nn.Parameter(v.new_ones(gain_shape(v, factorization)), requires_grad=False)  # torch's has no gain
        wide = statistics_dtype(v.dtype)
        return Conversion(name, layer, v, g, step._u.to(wide), step._v.to(wide))  # type: ignore[union-attr]
    what = ", ".join(f"{type(each).__name__} of {key}" for key in lists for each in lists[key])
    return f"is parametrized ({what}): torch.nn.utils.parametrize.remove_parametrizations first"


def _convert(
    name: str, layer: nn.Module, factorization: str, eps: float, project: bool, tied: Counter[int]
) -> Conversion | str:
    reason = _why_not(layer, factorization)
    if reason is not None:
        return reason
    if parametrize.is_parametrized(layer):
        found = _from_parametrization(name, layer, factorization)
    else:
        weight: Any = layer._parameters["weight"]
        try:
            factors = factor_weight(weight.detach(), factorization, eps, project=project)
        except ValueError as error:
            raise ValueError(f"'{name}' cannot be factored: {error}. The model is as it was") from error
        g = nn.Parameter(factors.g, requires_grad=weight.requires_grad)
        found = Conversion(name, layer, weight, g, factors.left, factors.right)
    if isinstance(found, Conversion) and max(tied[id(found.v)], tied[id(found.g)]) > 1:
        return "shares its weight with another module, which would see the direction in its place"
    return found


@torch.no_grad()
def plan_factoring(model: nn.Module, factorization: str, eps: float, select: Select | None, project: bool) -> Plan:
    """Decide for each linear and convolution layer that is selected; nothing is changed.

    Raises:
        ValueError: a weight cannot be represented; the message has its name.
    """
    plan, tied = Plan([], [], []), owners(model)
    for module, names in names_by_module(model).items():
        if not is_linear_or_conv(module) or not (select is None or any(select(name, module) for name in names)):
            continue
        name = names[0]
        if isinstance(module, FactoredLayer):
            if module.factorization == factorization:
                plan.already.append(name)
            else:
                plan.left.append((name, f"is factored by {module.factorization}: merge_factored it first"))
            continue
        found = _convert(name, module, factorization, eps, project, tied)
        if isinstance(found, str):
            plan.left.append((name, found))
        else:
            plan.conversions.append(found)
    return plan
