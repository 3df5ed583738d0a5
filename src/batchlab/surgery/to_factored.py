"""Factor the weights of a model that exists (Salimans & Kingma 2016, section 2, and three relatives)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from batchlab.functional.factored import check_factorization
from batchlab.reference.factored import CENTERED
from batchlab.surgery.factored_apply import current_weight, factor_in_place, undone_on_exception
from batchlab.surgery.factored_plan import Plan, Select, plan_factoring
from batchlab.surgery.wrappers import check_model

__all__ = ["to_factored"]

ROUNDINGS = 8  # of the dtype, relative to the largest weight: norm, gain and product


def _lines(named: list[tuple[str, str]]) -> str:
    return "".join(f"\n  '{name}' {reason}" for name, reason in named)


def _check(name: str, before: Tensor, after: Tensor) -> None:
    known = before.isfinite()  # torch's weight_norm of a zero is NaN; that is to change
    if not known.any():
        return
    expected = before[known].double()
    difference = float((after[known].double() - expected).abs().max())
    if not difference <= ROUNDINGS * torch.finfo(before.dtype).eps * float(expected.abs().max()):
        raise ValueError(
            f"the weight of '{name}' would change by {difference:.3g}; the model is as it was. Its direction may be "
            "shorter than eps: give a smaller eps"
        )


def _apply(plan: Plan, factorization: str, eps: float, verify: bool) -> None:
    with undone_on_exception([conversion.layer for conversion in plan.conversions]):
        for conversion in plan.conversions:
            before = current_weight(conversion.layer)
            factor_in_place(conversion, factorization, eps)
            if verify:
                _check(conversion.name, before, current_weight(conversion.layer))


def to_factored(
    model: nn.Module,
    factorization: str = "weight_norm",
    *,
    select: Select | None = None,
    eps: float = 1e-5,
    project: bool = False,
) -> nn.Module:
    """Turn a model's linear and convolution layers into factored ones, in place; return the model.

    Linear, Conv1d, Conv2d, Conv3d   become   FactoredLinear, FactoredConv1d, 2d, 3d, of the same function

    The layers are the same objects under the same names, so that shared layers, hooks, modes and references stay. The
    weight is the direction v now, and the bias the bias: the same Parameter objects, v without the gradient that it
    had. Gains g are new: build the optimizer afterwards, or give it the gains with `add_param_group`. State-dict keys
    change from `weight` to `g` and `v`; checkpoints from before load nevertheless.

    Layers that carry torch.nn.utils.parametrizations' weight_norm or spectral_norm become ours, with the Parameters
    that they have, where that is the factorization asked for. What cannot be converted stays, with one warning that
    says why: subclasses, other parametrizations, transposed convolutions, patched layers, weights that are tied to
    another module. Applied twice is applied once. Each effective weight is compared with the weight before.

    Args:
        model: changed in place; on any exception it is as before.
        factorization: "weight_norm", "centered_weight_norm", "weight_standardization" or "spectral_norm".
        select: says of a name and a layer whether to convert it; None: all. A layer with several names is converted
            if one of them is selected.
        eps: see `batchlab.nn.FactoredLinear`.
        project: accept that centred factorizations drop the mean of each unit's weight, which changes the model.

    Raises:
        TypeError: the model is wrapped (DistributedDataParallel, torch.compile, ...) or scripted.
        ValueError: no layer to convert; a weight with a mean that would be lost (by name, with its share), with inf or
            NaN; an option; a lazy parameter, or the meta device.

    Source: Salimans & Kingma 2016, section 2.

    >>> from torch import nn
    >>> to_factored(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), select=lambda name, _: name == "0")
    Sequential(
      (0): FactoredLinear(in_features=4, out_features=3, bias=True, factorization='weight_norm')
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    check_model(model, "to_factored")
    check_factorization(factorization, eps)
    if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model is on the meta device and has no values to factor: load its weights first")
    plan = plan_factoring(model, factorization, eps, select, project)
    if not plan.conversions and not plan.already:
        chosen = "" if select is None else " that select chooses"
        there = f"; these cannot be:{_lines(plan.left)}" if plan.left else ""
        raise ValueError(f"{type(model).__name__} has no linear or convolution layer to factor{chosen}{there}")
    _apply(plan, factorization, eps, verify=not (project and factorization in CENTERED))
    if plan.left:
        warnings.warn(f"to_factored left these layers as they were:{_lines(plan.left)}", stacklevel=2)
    return model
