"""Turn a network into a batch-normalized one (Ioffe & Szegedy 2015, Algorithm 2, lines 1 to 5; section 3.2)."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from batchlab.functional.running_statistics import check_momentum
from batchlab.surgery.dataflow import Dataflow, trace
from batchlab.surgery.example import Example, Run, run_example, split_example
from batchlab.surgery.insertion import insert, undone_on_exception
from batchlab.surgery.insertion_plan import Plan, plan_insertions
from batchlab.surgery.same_calls import calls_without
from batchlab.surgery.wrappers import check_model

__all__ = ["insert_batch_norm"]

WAY_OUT = "Insert into the submodules that are traceable, one by one, or write the normalizations into the model."


def _lines(left: list[tuple[str, str]]) -> str:
    return "".join(f"\n  {name}: {reason}" for name, reason in left)


def _run(model: nn.Module, example: Example | None, when: str) -> Run | None:
    if example is None:
        return None
    try:
        return run_example(model, example)
    except Exception as error:
        raise ValueError(
            f"the model does not run on example_input {when}: {type(error).__name__}: {error}. Give a tensor, or a "
            "tuple of the forward's arguments"
        ) from error


def _look(model: nn.Module, example: Example | None, when: str) -> tuple[Dataflow, Plan]:
    run = _run(model, example, when)
    flow = trace(model, example, training=True, way_out=WAY_OUT)
    return flow, plan_insertions(model, flow, run)


def _insert_and_check(
    model: nn.Module, example: Example | None, flow: Dataflow, plan: Plan, eps: float, momentum: float | None
) -> None:
    calls = calls_without(flow, model, [])
    with undone_on_exception(model):
        norms = insert(model, plan.insertions, eps, momentum)
        after, new_plan = _look(model, example, "after the insertion (nothing was inserted)")
        if new_plan.insertions or calls_without(after, model, norms) != calls:
            raise ValueError(
                "the model's forward looks at its own layers in a way that a normalization between them changes; "
                "nothing was inserted. " + WAY_OUT
            )


def insert_batch_norm(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...] | dict[str, Any] | None = None,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> nn.Module:
    """Put a batch normalization before each nonlinearity of a stock model, in place, and return the model.

    z = g(W u + b)   becomes   z = g(BN(W u)):  the mean is subtracted and BN has a shift β, so b is dropped

    A nonlinearity (relu, sigmoid, tanh, silu, gelu, ...; as module, function or method) gets one if its input is the
    output of a linear or convolution layer that is called once and feeds nothing else. Where both are neighbours in an
    `nn.Sequential` the normalization goes between them, and what follows is renumbered; elsewhere the layer is
    replaced by `nn.Sequential(layer, norm)` under its name. Nonlinearities that are normalized already stay, so
    applying this twice is applying it once. Those that cannot be (after an addition, a layer that is used twice, a
    linear layer on sequences, ...) stay as well, with one warning that lists them. Softmax and dropout are not
    nonlinearities here; the insides of torch's own compound layers (LSTM, TransformerEncoderLayer) are not touched.

    Parameters that stay are the same objects. Build the optimizer afterwards: it must learn the new γ and β, and must
    not hold the dropped biases. An output nonlinearity is a nonlinearity too; leave it to the loss
    (`BCEWithLogitsLoss`) if it should not be normalized.

    Args:
        model: changed in place; on any exception it is as before.
        example_input: the input, or a tuple of the arguments, or a dict of keyword arguments. Shows layers that get
            inputs of other than their usual number of dimensions, and checks that the changed model runs. Without it,
            linear layers are taken to get (N, features).
        eps: of the new layers.
        momentum: of the new layers.

    Raises:
        TypeError: the model is wrapped (DistributedDataParallel, torch.compile, ...) or scripted.
        ValueError: nothing can be inserted and nothing is normalized already, the forward cannot be traced, the model
            does not run on `example_input`, a parameter is lazy, or eps or momentum are out of range.

    Source: Ioffe & Szegedy 2015, Algorithm 2 and section 3.2.

    >>> from torch import nn
    >>> model = insert_batch_norm(nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)))
    >>> [type(layer).__name__ for layer in model], model[0].bias
    (['Linear', 'BatchNorm1d', 'Sigmoid', 'Linear'], None)
    """
    check_model(model, "insert_batch_norm")
    check_momentum(momentum)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it is added to the variance and must be 0 or larger")
    example = None if example_input is None else split_example(example_input)
    flow, plan = _look(model, example, "before anything is changed")
    if not plan.insertions and not plan.normalized:
        found = f"the nonlinearities that were found are left:{_lines(plan.left)}" if plan.left else "none was found"
        raise ValueError(
            "no nonlinearity in the model can be given a batch normalization; " + found + "\nA normalization goes "
            "between a linear or convolution layer and the nonlinearity that alone uses its output"
        )
    if plan.insertions:
        _insert_and_check(model, example, flow, plan, eps, momentum)
    if plan.left:
        warnings.warn(
            f"insert_batch_norm left {len(plan.left)} nonlinearities as they were:{_lines(plan.left)}", stacklevel=2
        )
    return model
