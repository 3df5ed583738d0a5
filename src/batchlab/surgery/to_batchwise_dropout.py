"""Turn a model's dropout into one that saves the work it drops (Graham, Reizenstein & Robinson 2015)."""

from __future__ import annotations

import contextlib
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from batchlab.surgery.dataflow import trace
from batchlab.surgery.dropout_apply import apply_conversion
from batchlab.surgery.dropout_calls import watch_training
from batchlab.surgery.dropout_checks import check_conversion
from batchlab.surgery.dropout_dims import View
from batchlab.surgery.dropout_plan import (
    Found,
    Plan,
    find_dropouts,
    functional_dropouts,
    outermost_chains,
    plan_conversion,
)
from batchlab.surgery.example import Example, split_example
from batchlab.surgery.wrappers import check_model

__all__ = ["to_batchwise_dropout"]


def _lines(named: list[tuple[str, str]]) -> str:
    return "".join(f"\n  {name}: {reason}" for name, reason in named)


def _views(model: nn.Module, example: Example) -> list[View]:
    """A trace of the model or, where its forward depends on values, of the Sequentials in it."""
    with contextlib.suppress(ValueError):
        return [View("", model, trace(model, example, training=True, way_out=""))]
    views = []
    for name, chain in outermost_chains(model).items():
        with contextlib.suppress(ValueError):
            views.append(View(name, chain, trace(chain, None, training=True, way_out="")))
    return views


def _plan(model: nn.Module, found: Found, example: Example) -> Plan:
    called = watch_training(model, example)
    views = _views(model, example)
    plan = plan_conversion(model, found, called, views)
    for view in views:
        plan.left.extend(functional_dropouts(view))
    return plan


def _report(plan: Plan) -> str:
    parts = []
    if plan.masking:
        parts.append(
            "these dropouts are batchwise now, but only mask, which saves no work; to save it, put each with the "
            f"layers around it into an nn.Sequential, and convert again:{_lines(plan.masking)}"
        )
    if plan.left:
        parts.append(f"these dropouts are left as they were:{_lines(plan.left)}")
    return "to_batchwise_dropout: " + "\n".join(parts)


def to_batchwise_dropout(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...] | dict[str, Any],
    *,
    exact: bool = True,
    mode: str = "auto",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Make a stock model's dropout batchwise, in place, so that what is dropped is not computed; return the model.

    nn.Dropout, nn.Dropout1d, 2d, 3d                        become   BatchwiseDropout(p, exact, generator, dim)
    nn.Sequential with them next to linear or conv layers   become   SubmatrixSequential(mode)

    One pattern a batch instead of one per sample; evaluation is as before. The outermost Sequential is taken, nested
    ones are part of it. The modules are the same objects under the same names, so that state-dict keys, parameters,
    hooks and modes stay, and optimizers that exist go on; `batchlab.optim.SubmatrixSGD` has the full speed.

    `dim`, where the features are, is 1 for Dropout1d to 3d and for inputs (N, C). On more dimensions nn.Dropout is
    placed by the layers that feed it, else by those that it feeds: the last dimension at Linear, LayerNorm, Embedding,
    attention or recurrent layers; 1 at convolutions and batch norms. There it drops whole feature maps, as Dropout2d
    does, where the stock layer dropped single values.

    A dropout outside of such a Sequential becomes batchwise too, but masks, which saves no work. What cannot be
    converted stays: dropout functions, the insides of attention, recurrent and Transformer layers, AlphaDropout,
    subclasses, what the example does not reach. One warning lists both, with reasons. (Functions are seen if torch.fx
    can trace the model.) Applied twice is applied once.

    Before the model is changed, a converted copy makes a training step on the example, in float64 (the model's own
    dtype where it does not run in that). With the same features kept, outputs and all gradients must be those of the
    masked dense network, to 1e-12 (float32: 1e-6) of the largest value or what another rounding of the weights makes,
    and the evaluation as before. Hooks take part in that, on the copies.

    Args:
        model: changed in place; on any exception it is as before. Buffers, gradients and random states stay.
        example_input: a batch, as in training: the input, or a tuple of the arguments, or a dict of keyword arguments.
        exact: of the dropouts: keep a fixed number of features, or each with probability 1 - p.
        mode: of the containers: "auto", "submatrix" or "mask".
        generator: of the dropouts: where patterns are drawn from; None: torch's default generator.

    Raises:
        TypeError: the model is wrapped (DistributedDataParallel, torch.compile, ...) or scripted.
        ValueError: no dropout to convert; one whose feature dimension is not clear, or that gets inputs without a
            batch or of different numbers of dimensions; the model does not run on the example; the converted copy
            differs; an option, a lazy parameter, or the meta device.

    Source: Graham, Reizenstein & Robinson 2015, section 2.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    >>> to_batchwise_dropout(model, torch.randn(4, 8))
    SubmatrixSequential(
      mode='auto'
      dropout 2 leaves out rows of 0 and columns of 3
      (0): Linear(in_features=8, out_features=16, bias=True)
      (1): ReLU()
      (2): BatchwiseDropout(p=0.5)
      (3): Linear(in_features=16, out_features=3, bias=True)
    )
    """
    check_model(model, "to_batchwise_dropout")
    BatchwiseDropout(exact=exact, generator=generator)  # they check their options
    SubmatrixSequential(mode=mode)
    if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model is on the meta device and has no values to verify by: load its weights first")
    found = find_dropouts(model)
    if not found.stock and not found.batchwise:
        there = f"; those that are there cannot be converted:{_lines(found.left)}" if found.left else ""
        raise ValueError(
            f"{type(model).__name__} has no nn.Dropout, Dropout1d, Dropout2d or Dropout3d to convert{there}"
        )
    plan = Plan({}, [], [], found.left)
    if found.stock or outermost_chains(model):
        example = split_example(example_input)
        plan = _plan(model, found, example)
        convert = partial(apply_conversion, plan=plan, exact=exact, mode=mode, generator=generator)
        if plan.dims or plan.chains:
            check_conversion(model, example, convert)
            convert(model)
    if plan.masking or plan.left:
        warnings.warn(_report(plan), stacklevel=2)
    return model
