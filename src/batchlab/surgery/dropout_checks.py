"""Does a converted model train as the dense network with the same features masked, and evaluate as before?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from batchlab.nn import BatchwiseDropout
from batchlab.surgery.copies import copy_model, copy_to_run, preserved_random_state
from batchlab.surgery.dropout_calls import cloned
from batchlab.surgery.dropout_training import TrainingStep, perturbed, train_once
from batchlab.surgery.example import Example
from batchlab.surgery.verify import compare, exact_float32, tensors_in

__all__ = ["check_conversion"]

TOLERANCES: Final = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Allowed difference, relative to the largest value, by the narrowest dtype that takes part."""

CONDITION: Final = 100.0
"""Allowed difference, in times of what another rounding of weights and inputs makes: for networks that amplify it."""


class _Converted(NamedTuple):
    """A converted copy, the arguments for it, and what it has to agree with."""

    copy: nn.Module
    example: Example
    evaluated: Any
    masked: TrainingStep
    tolerance: float


@torch.no_grad()
def _evaluate(model: nn.Module, example: Example) -> Any:
    with preserved_random_state(model):
        return copy_to_run(model).eval()(*cloned(example.args), **cloned(example.kwargs))


def _convert_copy(
    model: nn.Module, example: Example, convert: Callable[[nn.Module], None], dtype: torch.dtype | None
) -> _Converted:
    copied, example = copy_model(model), Example(cloned(example.args, dtype), cloned(example.kwargs, dtype))
    if dtype is not None:
        copied = copied.to(dtype)
    evaluated = _evaluate(copied, example)
    if next(tensors_in(evaluated), None) is None:
        raise ValueError(f"it returns {type(evaluated).__name__} without tensors, nothing to verify by")
    convert(copied)
    for module in copied.modules():
        if isinstance(module, BatchwiseDropout):
            module.generator = None  # all draw from torch's, whose state is set back
    masked = train_once(copied, example, None)
    taking_part = [*copied.parameters(), *tensors_in([evaluated, masked.outputs])]
    dtypes = {t.dtype for t in taking_part if t.is_floating_point()}
    tolerance = max((TOLERANCES.get(seen, TOLERANCES[torch.bfloat16]) for seen in dtypes), default=0.0)
    return _Converted(copied, example, evaluated, masked, tolerance)


def _widest(model: nn.Module, example: Example, convert: Callable[[nn.Module], None]) -> _Converted:
    try:
        return _convert_copy(model, example, convert, torch.float64)
    except Exception:  # something in it is bound to a dtype, or the device has no float64
        try:
            return _convert_copy(model, example, convert, None)
        except Exception as error:
            raise ValueError(
                "the model with batchwise dropouts that mask does not make a training step and an evaluation on "
                f"example_input: {type(error).__name__}: {error}; it is as it was"
            ) from error


def _train(converted: _Converted, mode: str) -> TrainingStep:
    try:
        return train_once(converted.copy, converted.example, mode)
    except Exception as error:
        raise ValueError(
            f'the converted model does not run with mode="{mode}": {type(error).__name__}: {error}; it is as it was'
        ) from error


def _differences(expected: TrainingStep, actual: TrainingStep, tolerance: float, buffers: bool) -> dict[str, Any]:
    pairs: dict[str, tuple[Any, Tensor]] = {
        "outputs": (expected.outputs, actual.outputs),
        "gradients": (expected.gradients, actual.gradients),
    }
    if buffers:
        pairs["buffers"] = (expected.buffers, actual.buffers)
    return {what: compare(*pair, tolerance) for what, pair in pairs.items()}


def _check(converted: _Converted, expected: TrainingStep, actual: TrainingStep, which: str, buffers: bool) -> None:
    found = _differences(expected, actual, converted.tolerance, buffers)
    if all(agreement.holds for agreement in found.values()):
        return
    moved = train_once(*perturbed(converted.copy, converted.example), None)
    by_rounding = _differences(converted.masked, moved, converted.tolerance, buffers)
    for what, agreement in found.items():
        allowed = max(agreement.allowed, CONDITION * by_rounding[what].difference)
        if not agreement.holds and not agreement.difference <= allowed < float("inf"):
            _refuse(f"{what} with {which}", agreement.difference, allowed)


def _refuse(where: str, difference: float, allowed: float) -> None:
    raise ValueError(
        f"the converted model differs in {where} by {difference:.3g} (allowed: {allowed:.3g}); the model is as it was. "
        "Look for layers whose forward was patched, and for random numbers from a generator of the model's own"
    )


def check_conversion(model: nn.Module, example: Example, convert: Callable[[nn.Module], None]) -> None:
    """Convert a copy and compare, in float64 if the model runs in it, else in its own dtype.

    In training, with the same kept patterns: submatrix, mask, and plain Sequentials in which dropouts mask have the
    same outputs and gradients; submatrix and mask also the same buffers. In evaluation the output is as before.

    Args:
        model: the original; it stays as it is.
        example: arguments of its forward.
        convert: changes a copy of it.

    Raises:
        ValueError: they differ by more than rounding, or a copy does not run.
    """
    with exact_float32(model):
        converted = _widest(model, example, convert)
        masked, on_submatrices = _train(converted, "mask"), _train(converted, "submatrix")
        _check(converted, converted.masked, masked, 'mode="mask"', buffers=False)
        _check(converted, converted.masked, on_submatrices, 'mode="submatrix"', buffers=False)
        _check(converted, masked, on_submatrices, 'mode="submatrix"', buffers=True)
        evaluation = compare(converted.evaluated, _evaluate(converted.copy, converted.example), converted.tolerance)
        if not evaluation.holds:
            _refuse("evaluation", evaluation.difference, evaluation.allowed)
