"""Optimizer groups in which only weights decay (He et al. 2015, section 2.1: no decay on PReLU's slopes)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize

from batchlab.nn.running_statistics import RunningStatistics

__all__ = ["parameter_groups"]

NEVER: Final[tuple[type[nn.Module], ...]] = (
    *(_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU),
    RunningStatistics,  # batchlab's normalizations: a learned coloring is a matrix for each group of channels
)
"""Layers whose own parameters are scales, shifts or slopes, of any number of dimensions."""

GAINS: Final = {"g": "v", "weight_g": "weight_v"}
"""Names of a factored weight's length, (out, 1, ...) in some factorizations, and of its direction beside it."""

PARAMETRIZED_GAIN: Final = "a parametrization's gain"


class _Use(NamedTuple):
    """One place where a parameter is registered: its full name, the module that uses it, and as what."""

    name: str
    owner: nn.Module
    key: str


def _use(model: nn.Module, path: str, module: nn.Module, key: str) -> _Use:
    name = f"{path}.{key}".lstrip(".")
    if isinstance(module, parametrize.ParametrizationList) and key.startswith("original"):
        # `layer.parametrizations.weight.original` is used by `layer`, as its weight.
        layer, _, tensor = path.rpartition("parametrizations.")
        is_gain = key == "original0" and any(isinstance(part, parametrizations._WeightNorm) for part in module)
        return _Use(name, model.get_submodule(layer.rstrip(".")), PARAMETRIZED_GAIN if is_gain else tensor)
    return _Use(name, module, key)


def _uses(model: nn.Module) -> dict[int, list[_Use]]:
    """Every place of every parameter, by the parameter's id."""
    uses: dict[int, list[_Use]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            uses.setdefault(id(parameter), []).append(_use(model, path, module, key))
    return uses


def _is_weight(use: _Use, shape: torch.Size) -> bool:
    if isinstance(use.owner, NEVER) or use.key == PARAMETRIZED_GAIN or "bias" in use.key.split("_"):
        return False
    if use.key in GAINS and (hasattr(use.owner, GAINS[use.key]) or sum(size > 1 for size in shape) < 2):
        return False
    return len(shape) >= 2


def _matches(use: _Use, rule: str | type[nn.Module]) -> bool:
    return fnmatchcase(use.name, rule) if isinstance(rule, str) else isinstance(use.owner, rule)


def _check_rules(given: Any, uses: dict[int, list[_Use]]) -> tuple[str | type[nn.Module], ...]:
    rules = (given,) if isinstance(given, (str, type)) else tuple(given)
    for rule in rules:
        if not isinstance(rule, str) and not (isinstance(rule, type) and issubclass(rule, nn.Module)):
            raise TypeError(
                f"no_decay holds {rule!r}; give classes of layers (nn.Embedding) and patterns of parameters' names "
                "('*.pos_embed')"
            )
        if not any(_matches(use, rule) for places in uses.values() for use in places):
            what = f"pattern {rule!r}" if isinstance(rule, str) else f"class {rule.__name__}"
            raise ValueError(
                f"no parameter of the model belongs to no_decay's {what}; names are as in model.named_parameters(), "
                "and * stands for anything"
            )
    return rules


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: str | type[nn.Module] | Iterable[str | type[nn.Module]] = (),
) -> list[dict[str, Any]]:
    """Sort a model's parameters into groups for an optimizer, so that weights decay and nothing else does.

    "decay":      weights: parameters of two and more dimensions, embeddings and factored directions among them
    "no_decay":   biases; scales and shifts of normalizations; slopes of PReLU, which decay would push towards ReLU;
                  gains of factored weights; anything else with fewer than two dimensions

    Normalizations are BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm, what extends them, and batchlab's, with
    parameters of any shape: a whitening's learned coloring is its scale. A bias has "bias" as a word of its name
    (`bias`, `in_proj_bias`, `bias_hh_l0`). Parametrized tensors count as what they stand for.

    Each parameter of `model.parameters()` is in exactly one group, in that order; those that need no gradient too, as
    torch's optimizers pass over them until they do. A parameter that is registered in several places decays if one of
    them makes it a weight. A group without parameters is left out.

    Args:
        model: any module, wrapped (DistributedDataParallel, torch.compile) or not; it is only read.
        weight_decay: of the first group.
        no_decay: what shall not decay besides: classes of layers, and patterns of parameters' names as in
            `model.named_parameters()` ("*.pos_embed"). They win over everything else, at any place of a parameter.

    Returns:
        dicts for the optimizer's first argument: "params", "weight_decay", "name" ("decay", "no_decay"), and
        "param_names", which torch's optimizers keep in their `state_dict()`.

    Raises:
        TypeError: the model is no module, or `no_decay` holds something else than classes and patterns.
        ValueError: weight_decay is negative or not finite, a rule of `no_decay` fits no parameter, a parameter is
            lazy, or there are no parameters.

    Source: He et al. 2015, section 2.1, for the slopes; custom for the rest.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Flatten(), nn.Linear(8, 2))
    >>> groups = parameter_groups(model, 5e-4)
    >>> for group in groups:
    ...     print(group["name"], group["weight_decay"], group["param_names"])
    decay 0.0005 ['0.weight', '4.weight']
    no_decay 0.0 ['0.bias', '1.weight', '1.bias', '2.weight', '4.bias']
    >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(weight_decay, bool) or not math.isfinite(weight_decay) or weight_decay < 0:
        raise ValueError(f"weight_decay is {weight_decay!r}; it must be a finite number, 0 or more")
    uses = _uses(model)
    rules = _check_rules(no_decay, uses)
    groups: list[dict[str, Any]] = [
        {"name": "decay", "weight_decay": weight_decay, "params": [], "param_names": []},
        {"name": "no_decay", "weight_decay": 0.0, "params": [], "param_names": []},
    ]
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"'{name}' is not initialized, and its shape decides: run one batch through the model first"
            )
        places = uses[id(parameter)]
        excluded = any(_matches(use, rule) for use in places for rule in rules)
        decays = not excluded and any(_is_weight(use, parameter.shape) for use in places)
        group = groups[0 if decays else 1]
        group["params"].append(parameter)
        group["param_names"].append(name)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameters")
    return groups
