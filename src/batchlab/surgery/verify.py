"""Do two models return the same, up to rounding?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Agreement", "compare", "exact_float32", "tolerance_for"]

TOLERANCES: Final = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Allowed difference, relative to the largest output, by the narrowest dtype that takes part."""

SMALLEST_SCALE: Final = 1e-6  # outputs that are zero have no scale of their own


class Agreement(NamedTuple):
    """Largest absolute difference of two outputs, in the tensor that uses most of what it may be, and whether it is."""

    difference: float
    allowed: float
    holds: bool


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def tolerance_for(model: nn.Module, output: Any) -> float:
    """Return the tolerance of the narrowest floating dtype among parameters and outputs."""
    dtypes = {t.dtype for t in [*model.parameters(), *tensors_in(output)] if t.is_floating_point()}
    return max((TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in dtypes), default=0.0)


def _difference(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.detach().cpu().to(wide), actual.detach().cpu().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0, (a - b).abs()).nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def _scale(expected: Tensor) -> float:
    if not expected.numel() or not (expected.is_floating_point() or expected.is_complex()):
        return 0.0  # indices and booleans are equal or they are not
    finite = expected.detach().abs().cpu().double().nan_to_num(nan=0.0, posinf=0.0)
    return max(float(finite.max()), SMALLEST_SCALE)


def _used(pair: tuple[float, float]) -> tuple[float, float]:
    """How much of its allowance a tensor uses; then, among those that have none, how large the allowance is."""
    difference, allowed = pair
    return (difference / allowed if allowed else difference and float("inf")), allowed


def compare(expected: Any, actual: Any, tolerance: float) -> Agreement:
    """Compare all tensors of two outputs; each may differ by `tolerance` times its largest value.

    >>> compare({"y": torch.tensor([1.0, 10.0])}, {"y": torch.tensor([1.0, 10.25])}, tolerance=0.1)
    Agreement(difference=0.25, allowed=1.0, holds=True)
    """
    first, second = list(tensors_in(expected)), list(tensors_in(actual))
    if len(first) != len(second):
        return Agreement(float("inf"), 0.0, False)
    pairs = [(_difference(a, b), tolerance * _scale(a)) for a, b in zip(first, second, strict=True)]
    difference, allowed = max(pairs, key=_used, default=(0.0, 0.0))
    return Agreement(difference, allowed, difference <= allowed)


@contextmanager
def exact_float32(model: nn.Module) -> Iterator[None]:
    """Compute float32 products in float32 where GPUs by default round to 10 bits, which would hide what is compared."""
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    cudnn: Any = torch.backends.cudnn  # whose stubs do not know conv and rnn
    backends = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul] if on_gpu else []
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
