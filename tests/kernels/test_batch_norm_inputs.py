"""Batch norm's compiled kernel on inputs of any shape, layout and size of number, against torch's in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from batchlab import functional
from batchlab.kernels import batch_norm as kernel

pytestmark = pytest.mark.skipif(not kernel.available(), reason="there is no C++ compiler")

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
FLOOR = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(FLOOR)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


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


Function = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def _run(function: Function, activation: str | None, leaves: list[Tensor | None], gradient: Tensor) -> list[Tensor]:
    """Output and gradients of what is given; `function` normalizes x, and torch does the rest for all but ours."""
    given = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    assert given[0] is not None
    y = function(given[0], given[1], given[2])
    y = ACTIVATIONS[activation](y if given[3] is None else y + given[3])
    wanted = [t for t in given if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, gradient)]


def _by_channel(errors: Tensor) -> Tensor:
    """The largest of each channel, of (N, C, ...) or (C,)."""
    errors = errors.detach().double().abs()
    return errors if errors.ndim == 1 else errors.transpose(0, 1).flatten(1).amax(1)


def _check(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], floor: float) -> None:
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        allowed = 2 * _by_channel(other.double() - right) + floor * _by_channel(right).clamp(min=1)
        assert (_by_channel(mine.double() - right) <= allowed).all()


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls(), st.integers(0, 1000))
def test_any_input_is_normalized_as_in_float64(call: Call, seed: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(call.threads)
    channels = call.shape[1]
    statistics = torch.float64 if call.dtype == torch.float64 else torch.float32
    x = LAYOUTS[call.layout]((torch.randn(call.shape, dtype=torch.float64) + call.mean).to(call.dtype))
    residual = None if call.residual is None else LAYOUTS[call.residual](torch.randn(call.shape).to(call.dtype))
    weight, bias = (torch.randn(channels).to(statistics) if there else None for there in call.affine)
    leaves = [x, weight, bias, residual]
    # Around zero what torch does in float64 is more exact than what any of them does with float64 around 1000.
    wide = [None if t is None else t.double().contiguous() for t in (x.double() - call.mean, weight, bias, residual)]

    def torchs(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)

    gradient = torch.randn(call.shape)
    if call.activation in ("relu", "leaky_relu"):  # at the kink the rounding of the last digit chooses the derivative
        assert wide[0] is not None
        before = torchs(wide[0], wide[1], wide[2]) + (0 if wide[3] is None else wide[3])
        gradient[before.abs() < 2e-3] = 0
    gradient = LAYOUTS[call.gradient](gradient.to(call.dtype))
    if call.activation in ("relu", "leaky_relu") and call.gradient.startswith("expanded"):
        gradient = torch.zeros(()).to(call.dtype).expand(call.shape)

    mean, var = torch.zeros(channels, dtype=statistics), torch.ones(channels, dtype=statistics)
    given = [None if t is None else t.detach().requires_grad_() for t in leaves]  # with the strides that they have
    assert given[0] is not None
    y = functional.batch_norm(
        given[0],
        mean,
        var,
        given[1],
        given[2],
        True,
        1.0,
        activation=call.activation,
        residual=given[3],
        backend="fused",
    )
    assert not kernel.is_dense(x) or y.stride() == x.stride()
    ours = [y.detach(), *torch.autograd.grad(y, [t for t in given if t is not None], gradient)]
    theirs = _run(torchs, call.activation, leaves, gradient)
    exact = _run(torchs, call.activation, wide, gradient.double())
    _check(ours, theirs, exact, FLOOR[call.dtype])

    assert wide[0] is not None
    values = wide[0].transpose(0, 1).flatten(1)
    center, spread = values.mean(1) + call.mean, values.var(1)
    # Up to 64 numbers are summed in float: what is the same in all samples is rounded the same way each time.
    digit, sums = (2e-16, 1e-14) if statistics == torch.float64 else (6e-8, 2e-6)
    around = (values - values.mean(1, keepdim=True)).abs().amax(1)
    assert ((mean - center).abs() <= digit * center.abs() + sums * around).all()
    assert ((var - spread).abs() <= 5 * sums * spread + (digit * center) ** 2).all()

    mean, var = torch.randn(channels, dtype=torch.float64).to(statistics), torch.rand(channels).to(statistics) + 0.1
    evaluated = functional.batch_norm(
        x, mean, var, weight, bias, activation=call.activation, residual=residual, backend="fused"
    )
    right = F.batch_norm(x.double(), mean.double(), var.double(), wide[1], wide[2], False, 0.0, 1e-5)
    right = ACTIVATIONS[call.activation](right if wide[3] is None else right + wide[3])
    assert (_by_channel(evaluated.double() - right) <= FLOOR[call.dtype] * _by_channel(right).clamp(min=1)).all()


# Numbers that are none, too large or too small.

SHAPES = {"rows": (40, 5), "long rows": (70, 70), "planes": (6, 5, 5, 5), "small planes": (9, 5, 3)}
PLACES = pytest.mark.parametrize("place", [*SHAPES, "channels last"])


def _place(place: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = SHAPES.get(place, (6, 5, 5, 5))
    x = torch.randn(shape).to(dtype)
    return x if place in SHAPES else x.contiguous(memory_format=torch.channels_last)


@PLACES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_number_is_what_torch_makes_of_it_and_stays_in_its_channel(
    place: str, bad: float, dtype: torch.dtype
) -> None:
    clean = _place(place, dtype)
    dirty = clean.clone(memory_format=torch.preserve_format)
    dirty[1, 3].fill_(bad)
    channels = clean.shape[1]
    others = [c for c in range(channels) if c != 3]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.rand(channels, dtype=wide) + 0.5, torch.randn(channels, dtype=wide)
    gradient = torch.randn(clean.shape).to(dtype)
    for activation in ACTIVATIONS:
        for training in (True, False):
            results = []
            for x, ours in ((clean, True), (dirty, True), (dirty, False)):
                leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
                mean, var = torch.zeros(channels, dtype=wide), torch.ones(channels, dtype=wide)
                if ours:
                    y = functional.batch_norm(
                        leaves[0], mean, var, *leaves[1:], training, activation=activation, backend="fused"
                    )
                else:
                    y = ACTIVATIONS[activation](F.batch_norm(leaves[0], mean, var, *leaves[1:], training))
                gradients = torch.autograd.grad(y, leaves, gradient)
                results.append([y.detach(), *gradients, mean, var])
            for name, good, mine, theirs in zip(("y", "x", "weight", "bias", "mean", "var"), *results, strict=True):
                index = others if name not in ("y", "x") else (slice(None), others)
                assert torch.equal(mine[index], good[index]), name
                own = 3 if name not in ("y", "x") else (slice(None), 3)
                assert torch.equal(mine[own].isfinite(), theirs[own].isfinite()), (name, activation, training)
                if name not in ("mean", "var"):  # a mean of an inf is NaN here and inf in torch: neither is of use
                    assert torch.equal(mine[own].isnan(), theirs[own].isnan()), (name, activation, training)


@PLACES
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e-36, 1e-30, 1e-25, 1e-18, 1e18, 1e30, 1e37])
def test_moments_of_numbers_whose_squares_are_beyond_float(place: str, scale: float) -> None:
    x = (_place(place).double() * scale).float()
    values = x.double().transpose(0, 1).flatten(1)
    mean, variance = kernel.moments(x)
    assert ((mean - values.mean(1)).abs() <= 1e-7 * values.abs().amax(1)).all()
    torch.testing.assert_close(variance, values.var(1, unbiased=False), rtol=1e-6, atol=0.0)


@PLACES
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-20, 1e-3, 1e3, 1e10, 1e18])
def test_gradients_of_numbers_of_any_size(place: str, scale: float) -> None:
    x = (_place(place).double() * scale).float()
    gradient = torch.randn(x.shape)
    results = []
    for values in (x, x.double()):
        leaf = values.clone(memory_format=torch.preserve_format).requires_grad_()
        if values is x:
            y = functional.batch_norm(leaf, None, None, training=True, backend="fused")
        else:
            y = F.batch_norm(leaf, None, None, training=True)
        (found,) = torch.autograd.grad(y, leaf, gradient.to(values.dtype))
        results.append((y.detach().double(), found.double()))
    for mine, right in zip(*results, strict=True):
        assert (_by_channel(mine - right) <= 4e-6 * _by_channel(right) + 1.5e-45).all()


@PLACES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_that_are_constant_or_double(place: str, dtype: torch.dtype) -> None:
    x = _place(place, dtype)
    with torch.no_grad():
        x[:, 0] = 777.7
        x[:, 2] = 0
        x[:, 4] = x[:, 1]
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    y = functional.batch_norm(leaf, mean, var, training=True, momentum=1.0, backend="fused")
    gradient = torch.randn(x.shape).to(dtype)
    gradient[:, 4] = gradient[:, 1]
    (found,) = torch.autograd.grad(y, leaf, gradient)
    assert (y[:, (0, 2)] == 0).all()
    assert var[0] == var[2] == mean[2] == 0
    assert mean[0] == float(x[0, 0].flatten()[0])
    for both in (y, found):
        torch.testing.assert_close(both[:, 1], both[:, 4])
    # Around a constant the derivative is g - Σ g / n, over √eps.
    right = gradient[:, 0].double()
    right = (right - right.mean()) / math.sqrt(1e-5)
    assert float((found[:, 0].double() - right).abs().max()) <= FLOOR[dtype] * float(right.abs().max())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 4), (2, 3, 0), (2, 0, 3, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_numbers_at_all(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype)
    mean, var, batches = torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0)
    for residual in (None, x):
        y, saved = kernel.forward(x, None, None, residual, mean, var, batches, 0.1, 1e-5, 1)
        evaluated, _ = kernel.evaluate(x, mean, var, None, None, residual, 1e-5, 1)
        assert y.shape == evaluated.shape == x.shape
        assert (saved == 0).all()
        gradients = kernel.backward(y, x, y, None, saved, 1, residual_needed=True)
        assert [g.shape for g in gradients] == [x.shape, x.shape, (shape[1],), (shape[1],)]
        assert all((g == 0).all() for g in gradients)
        assert (kernel.gradient_sums(y, x, y, None, saved, 1) == 0).all()
    assert (kernel.moments(x) == 0).all()
    assert (mean == 0).all()
    assert (var == 1).all()
    assert batches == 0


# The same bits.

LARGE = {
    "rows": (3000, 40),
    "long rows": (130, 2100),
    "tiles of rows": (40, 4500),
    "planes": (20, 13, 17, 19),
    "few large planes": (3, 2, 190, 191),
    "small planes": (700, 33, 3),
}


def _everything(x: Tensor, activation: str) -> list[Tensor]:
    channels = x.shape[1]
    generator = torch.Generator().manual_seed(1)
    residual, gradient = (torch.randn(x.shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(channels, generator=generator).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(channels), torch.ones(channels)
    leaf = x.detach().requires_grad_()
    y = functional.batch_norm(
        leaf, mean, var, weight, bias, True, activation=activation, residual=residual, backend="fused"
    )
    gradients = torch.autograd.grad(y, (leaf, weight, bias), gradient)
    return [y.detach(), *gradients, mean, var, kernel.moments(x)]


@pytest.mark.parametrize("place", LARGE)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
def test_the_same_input_gives_the_same_bits(place: str, last: bool) -> None:
    x = torch.randn(LARGE[place])
    x = _permuted(x, (0, *range(2, x.ndim), 1)) if last else x
    elsewhere = _shifted(x.movedim(1, -1)).movedim(-1, 1) if last else _shifted(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        first = _everything(x, "silu")
        for again in (x, elsewhere):
            assert all(map(torch.equal, first, _everything(again, "silu")))


def test_threads_of_the_program_do_not_disturb_each_other() -> None:
    torch.set_num_threads(1)
    inputs = [torch.randn(LARGE[place]) for place in LARGE]
    expected = [_everything(x, "relu") for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: _everything(x, "relu"), inputs * 3))
    for one, other in zip(expected * 3, found, strict=True):
        assert all(map(torch.equal, one, other))
