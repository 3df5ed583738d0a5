"""Make batch normalization part of the layers around it (Ioffe & Szegedy 2015, Algorithm 2, line 11)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchlab.surgery.copies import copy_model
from batchlab.surgery.dataflow import trace
from batchlab.surgery.example import Example, Run, run_example, split_example
from batchlab.surgery.fold_apply import apply_folds
from batchlab.surgery.fold_checks import Usage, find_usage
from batchlab.surgery.fold_plan import FoldPlan, plan_folds
from batchlab.surgery.fold_report import FoldEntry, FoldReport, FoldResult
from batchlab.surgery.layers import ChannelNorm
from batchlab.surgery.verify import Agreement, compare, exact_float32, tensors_in, tolerance_for
from batchlab.surgery.wrappers import check_model

__all__ = ["fold"]

WAY_OUT = "Fold the submodules that are traceable, one by one: model.backbone = fold(model.backbone, features).model"


def _run_original(model: nn.Module, example: Example) -> Run:
    try:
        run = run_example(model, example)
    except Exception as error:
        raise ValueError(
            f"the model does not run on example_input in evaluation mode: {type(error).__name__}: {error}. Give a "
            "tensor, a tuple of the forward's arguments, or a dict of its keyword arguments"
        ) from error
    if next(tensors_in(run.output), None) is None:
        raise ValueError(f"the model returns {type(run.output).__name__} without tensors: nothing to verify a fold by")
    return run


def _fold_and_verify(
    model: nn.Module, plan: FoldPlan, example: Example, expected: Any, tolerance: float
) -> tuple[nn.Module, Agreement | str]:
    """Return a folded copy, and how its output agrees or why there is none."""
    folded = copy_model(model).eval()
    apply_folds(folded, plan)
    try:
        actual = run_example(folded, example).output
    except Exception as error:
        return folded, f"the model does not run without it: {type(error).__name__}: {error}"
    return folded, compare(expected, actual, tolerance)


def _one_by_one(model: nn.Module, usage: Usage, all_at_once: FoldPlan, example: Example, tolerance: float) -> FoldPlan:
    """Keep the folds that leave the output as it is, each tried on top of those kept before it."""
    kept: set[str] = set()
    refused: dict[str, str] = {}
    for step in all_at_once.steps:
        plan = plan_folds(model, usage, kept | {step.norm})
        if step.norm not in {s.norm for s in plan.steps}:
            refused[step.norm] = plan.refused[step.norm]
            continue
        _, result = _fold_and_verify(model, plan, example, usage.run.output, tolerance)
        if isinstance(result, str):
            refused[step.norm] = result
        elif not result.holds:
            refused[step.norm] = f"the output differs by {result.difference:.3g} (allowed: {result.allowed:.3g})"
        else:
            kept.add(step.norm)
    plan = plan_folds(model, usage, kept)
    return plan._replace(refused={**all_at_once.refused, **plan.refused, **refused})


def _entries(norms: list[str], plan: FoldPlan) -> tuple[FoldEntry, ...]:
    steps = {step.norm: step for step in plan.steps}
    return tuple(
        FoldEntry(name, steps[name].layer, "folded", steps[name].where, None)
        if name in steps
        else FoldEntry(name, None, "refused", None, plan.refused[name])
        for name in norms
    )


def fold(model: nn.Module, example_input: Tensor | tuple[Any, ...] | dict[str, Any]) -> FoldResult:
    """Return a copy for inference in which batch normalizations are part of the layers next to them, and a report.

    s = γ/√(running_var + eps),  t = β - running_mean·s
    after a layer:   s·(W x + b) + t = (diag(s) W) x + (s·b + t)
    before a layer:  W (s·x + t) + b = (W diag(s)) x + (b + W t);  zero padding becomes padding with -t/s

    The copy is in evaluation mode and keeps the model's class. A folded normalization is an `nn.Identity` (or its
    activation's module), so that all other state-dict keys stay, with one exception: a zero-padded convolution that
    takes in the normalization before it becomes `nn.Sequential(ChannelPad, conv)` under its name. The original is
    untouched. Computed in float64, cast at the end.

    Who feeds whom is read from a symbolic trace, not from the order of declaration. Folded are Linear, Conv1d to 3d and
    ConvTranspose1d to 3d, with any groups, strides, dilations and padding modes, and torch's and batchlab's batch
    normalizations with their variants (ghost, renorm, population, mean or variance alone); the layer before is
    preferred; `nn.Identity` and dropout in between do not matter. Refused, each with its reason in the report: what is
    called more than once, shared, parametrized, hooked or of an unknown subclass; outputs that something else uses too;
    normalizations on other dimensions than the layer's channels, with `residual=` or `mask=`, or without usable
    statistics; transposed convolutions after a normalization, unless exact.

    In the end both models run on the example. If they differ by more than rounding, the folds are tried one by one and
    those that make the difference are refused.

    Args:
        model: a trained model; see `recalibrate` for its statistics.
        example_input: the input, or a tuple of the arguments, or a dict of keyword arguments. Make it typical: it is
            what the fold is verified on.

    Raises:
        TypeError: the model is wrapped (DistributedDataParallel, torch.compile, ...) or scripted.
        ValueError: the forward cannot be traced, does not run on the example or returns no tensors, the model cannot
            be copied, or a parameter is lazy or on the meta device.

    Source: Ioffe & Szegedy 2015, Algorithm 2, line 11.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Sigmoid(), nn.Linear(3, 2))
    >>> folded, report = fold(model, torch.randn(8, 4))
    >>> folded
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): Identity()
      (2): Sigmoid()
      (3): Linear(in_features=3, out_features=2, bias=True)
    )
    >>> report.folded[0].where
    'into the layer before'
    """
    check_model(model, "fold")
    if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model is on the meta device and has no values to fold: load its weights first")
    copied = copy_model(model).eval()
    norms = [name for name, module in copied.named_modules() if isinstance(module, ChannelNorm)]
    if not norms:
        return FoldResult(copied, FoldReport((), 0.0, 0.0))
    example = split_example(example_input)
    flow = trace(copied, example, training=False, way_out=WAY_OUT)
    with exact_float32(copied), torch.no_grad():
        run = _run_original(copied, example)
        usage = find_usage(copied, flow, run)
        tolerance = tolerance_for(copied, run.output)
        plan = plan_folds(copied, usage)
        folded, result = _fold_and_verify(copied, plan, example, run.output, tolerance)
        if isinstance(result, str) or not result.holds:
            plan = _one_by_one(copied, usage, plan, example, tolerance)
            folded, result = _fold_and_verify(copied, plan, example, run.output, tolerance)
    if isinstance(result, str) or not result.holds:
        raise ValueError(
            "the model returns different outputs for the same example in evaluation mode, so that no fold can be "
            f"verified ({result}). Look for noise that stays on in evaluation"
        )
    return FoldResult(folded, FoldReport(_entries(norms, plan), result.difference, result.allowed))
