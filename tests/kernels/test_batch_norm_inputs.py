"""Batch norm's compiled kernel on inputs of any shape and layout, against numpy's longest float."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from batchlab import functional
from batchlab.kernels import batch_norm as kernel
from tests.batch_norm_tables import ACTIVATIONS, DTYPES, FLOOR

pytestmark = pytest.mark.skipif(not kernel.available(), reason="there is no C++ compiler")


# Memory: the same values with other strides.


def _permuted(values: Tensor, order: tuple[int, ...]) -> Tensor:
    back = [order.index(d) for d in range(values.ndim)]
    return values.permute(order).contiguous().permute(back)


def _sliced(values: Tensor) -> Tensor:
    room = torch.full([2 * size + 1 for size in values.shape], math.nan, dtype=values.dtype)
    view = room[tuple(slice(1, None, 2) for _ in values.shape)]
    view.copy_(values)
    return view


def _shifted(values: Tensor) -> Tensor:
    """One number away from where vectors begin."""
    room = torch.full((values.numel() + 1,), math.nan, dtype=values.dtype)
    return room[1:].view(values.shape).copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values.contiguous(),
    "channels last": lambda values: _permuted(values, (0, *range(2, values.ndim), 1)),
    "channels first": lambda values: _permuted(values, (1, 0, *range(2, values.ndim))),
    "reversed": lambda values: _permuted(values, tuple(reversed(range(values.ndim)))),
    "sliced": _sliced,
    "shifted": _shifted,
    "shifted, channels last": lambda values: _shifted(values.movedim(1, -1)).movedim(-1, 1),
    "expanded samples": lambda values: values[:1].contiguous().expand_as(values),
    "expanded channels": lambda values: values[:, :1].contiguous().expand_as(values),
    "expanded last": lambda values: values[..., :1].contiguous().expand_as(values),
}


class Call(NamedTuple):
    training: bool
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    activation: str | None
    residual: str | None
    gradient: str
    mean: float
    affine: tuple[bool, bool]
    threads: int


@st.composite
def calls(draw: st.DrawFn) -> Call:
    channels = draw(st.sampled_from([1, 7, 17, 33, 64, 100]))
    dimensions = draw(st.integers(2, 5))
    sizes = [1, 2, 3, 5, 7, 16, 17, 31]
    samples = draw(st.sampled_from([1, 2, 3, 5, 8, 61] if dimensions > 2 else [2, 3, 5, 8, 61, 130]))
    positions: list[int] = []
    for _ in range(dimensions - 2):
        room = 8000 // (samples * channels * math.prod(positions))
        positions.append(draw(st.sampled_from([size for size in sizes if size <= max(1, room)])))
    if samples * math.prod(positions) == 1:
        samples = 2
    layouts = st.sampled_from(list(LAYOUTS))
    return Call(
        draw(st.booleans()),
        (samples, channels, *positions),
        draw(layouts),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(list(ACTIVATIONS))),
        draw(st.none() | layouts),
        draw(layouts),
        draw(st.sampled_from([0.0, -30.0, 1e3])),
        draw(st.tuples(st.booleans(), st.booleans())),
        draw(st.integers(1, 3)),
    )


Numbers = np.ndarray[Any, np.dtype[np.longdouble]]
DERIVATIVES: dict[str | None, Callable[[Numbers], Numbers]] = {
    None: np.ones_like,
    "relu": lambda x: np.where(x > 0, 1, 0),
    "leaky_relu": lambda x: np.where(x > 0, 1, np.longdouble(0.01)),
    "silu": lambda x: (1 + np.exp(-x) + x * np.exp(-x)) / (1 + np.exp(-x)) ** 2,
    "sigmoid": lambda x: np.exp(-x) / (1 + np.exp(-x)) ** 2,
}
VALUES: dict[str | None, Callable[[Numbers], Numbers]] = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.maximum(x, x * np.longdouble(0.01)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def _numbers(tensor: Tensor) -> Numbers:
    return tensor.detach().double().numpy().astype(np.longdouble)


class Exact:
    """Batch norm in numpy's longest float: float64 around a mean of 1000 is no judge of float64."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.shape = (1, -1, *[1] * (x.ndim - 2))
        self.others = tuple(d for d in range(x.ndim) if d != 1)
        self.count = x.numel() // x.shape[1]
        values = _numbers(x)
        self.given = statistics is not None
        self.mean = values.mean(self.others) if statistics is None else _numbers(statistics[0])
        self.centered = values - self.mean.reshape(self.shape)
        self.var = (self.centered**2).mean(self.others) if statistics is None else _numbers(statistics[1])
        self.inverse = 1 / np.sqrt(self.var + np.longdouble(1e-5))
        self.normalized = self.centered * self.inverse.reshape(self.shape)
        self.weight = np.ones_like(self.mean) if weight is None else _numbers(weight)
        self.before = self.normalized * self.weight.reshape(self.shape)
        for added in (None if bias is None else bias.view(self.shape), residual):
            self.before = self.before + (0 if added is None else _numbers(added))

    def results(self, activation: str | None, gradient: Tensor) -> list[Numbers]:
        """Output, gradients of x, weight, bias and residual, running mean and variance."""
        g = _numbers(gradient) * DERIVATIVES[activation](self.before)
        one, two = g.mean(self.others), (g * self.normalized).mean(self.others)
        inner = g if self.given else g - one.reshape(self.shape) - self.normalized * two.reshape(self.shape)
        of_x = inner * (self.weight * self.inverse).reshape(self.shape)
        gradients = [of_x, two * self.count, one * self.count, g]
        unbiased = np.longdouble(1 if self.given else self.count / np.longdouble(self.count - 1))
        return [VALUES[activation](self.before), *gradients, self.mean, self.var * unbiased]


def _largest(errors: Numbers) -> Numbers:
    """Of each channel, from (N, C, ...) or (C,)."""
    errors = np.abs(errors)
    return errors if errors.ndim == 1 else errors.max(tuple(d for d in range(errors.ndim) if d != 1))


def _normalize(
    call: Call, leaves: list[Tensor | None], statistics: tuple[Tensor, Tensor], gradient: Tensor, ours: bool
) -> list[Tensor | None]:
    """Output and gradients (None: not given), running mean and variance, by our kernel or by torch's operations."""
    given = [None if t is None else t.detach().requires_grad_() for t in leaves]  # with the strides that they have
    x, weight, bias, residual = given
    assert x is not None
    mean, var = (t.clone() for t in statistics)
    arguments = (x, mean, var, weight, bias, call.training, 1.0)
    if ours:
        y = functional.batch_norm(*arguments, activation=call.activation, residual=residual, backend="fused")
        assert not kernel.is_dense(x) or y.stride() == x.stride()
    else:
        y = F.batch_norm(*arguments)
        y = ACTIVATIONS[call.activation](y if residual is None else y + residual)
    found = iter(torch.autograd.grad(y, [t for t in given if t is not None], gradient))
    return [y.detach(), *(None if t is None else next(found) for t in given), mean, var]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls(), st.integers(0, 1000))
def test_any_input_is_normalized_as_exactly_as_by_torch(call: Call, seed: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(call.threads)
    channels = call.shape[1]
    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
    x = LAYOUTS[call.layout]((torch.randn(call.shape, dtype=torch.float64) + call.mean).to(call.dtype))
    residual = None if call.residual is None else LAYOUTS[call.residual](torch.randn(call.shape).to(call.dtype))
    weight, bias = (torch.randn(channels).to(dtype) if there else None for there in call.affine)
    statistics = torch.randn(channels).to(dtype), torch.rand(channels).to(dtype) + 0.1
    exact = Exact(x, weight, bias, residual, None if call.training else statistics)
    gradient = torch.randn(call.shape)
    if call.activation in ("relu", "leaky_relu"):  # at the kink the rounding of the last digit chooses the derivative
        gradient[torch.from_numpy(np.abs(exact.before) < 2e-3)] = 0
    expanded = call.gradient.startswith("expanded") and call.activation in ("relu", "leaky_relu")
    gradient = LAYOUTS["contiguous" if expanded else call.gradient](gradient.to(call.dtype))

    # Rounding, measured by the size of what is added up, whatever is left of it in the end.
    floor, narrow, digit = FLOOR[call.dtype], FLOOR[dtype], float(torch.finfo(dtype).eps)
    largest, spread = _largest(_numbers(gradient)), _largest(exact.centered)
    limits = {
        "y": floor * np.maximum(1, _largest(exact.before)),
        "x": floor * largest * np.abs(exact.weight) * exact.inverse,
        "weight": floor * largest * math.sqrt(exact.count) * np.maximum(1, _largest(exact.normalized)),
        "bias": floor * largest * math.sqrt(exact.count),
        "residual": floor * largest,
        "mean": digit * np.abs(exact.mean) + narrow * spread,
        "var": (digit * exact.mean) ** 2 + narrow * spread**2,
    }
    right = exact.results(call.activation, gradient)
    leaves = [x, weight, bias, residual]
    found, theirs = (_normalize(call, leaves, statistics, gradient, ours) for ours in (True, False))
    for (name, limit), mine, other, should in zip(limits.items(), found, theirs, right, strict=True):
        if mine is None or other is None:
            continue
        assert mine.dtype == other.dtype
        allowed = limit + floor * _largest(should) * (name not in ("mean", "var"))
        assert (_largest(_numbers(mine) - should) <= allowed + 2 * _largest(_numbers(other) - should)).all(), name
