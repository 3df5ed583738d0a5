"""Batch norm's compiled kernel on numbers that are none, too large or too small, on no numbers, and to the last bit."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab import functional
from batchlab.kernels import batch_norm as kernel
from tests.batch_norm_tables import ACTIVATIONS, DTYPES, FLOOR

pytestmark = pytest.mark.skipif(not kernel.available(), reason="there is no C++ compiler")


def _by_channel(errors: Tensor) -> Tensor:
    """The largest of each channel."""
    return errors.abs().transpose(0, 1).flatten(1).amax(1)


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


@pytest.mark.parametrize("momentum", [0.0, 1e-3, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("start", [0.0, 1.0, -1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics_move_from_anywhere(momentum: float, start: float, dtype: torch.dtype) -> None:
    x = torch.randn(40, 5)
    mean, var = torch.full((5,), start, dtype=dtype), torch.full((5,), start, dtype=dtype)
    functional.batch_norm(x, mean, var, training=True, momentum=momentum, backend="fused")
    for moved, batch in ((mean, x.double().mean(0)), (var, x.double().var(0))):
        expected = (1 - momentum) * start + momentum * batch
        assert ((moved.double() - expected).abs() <= 2e-7 * (abs((1 - momentum) * start) + 1 + batch.abs())).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_batches_are_counted_in_any_integer_type(dtype: torch.dtype) -> None:
    batches = torch.tensor(4, dtype=dtype)
    mean, var = torch.zeros(5), torch.ones(5)
    x = torch.randn(40, 5)
    functional.batch_norm(x, mean, var, training=True, backend="fused", num_batches_tracked=batches)
    assert batches == 5
    torch.testing.assert_close(mean, 0.1 * x.mean(0))


def test_an_activation_of_very_negative_numbers_is_nothing() -> None:
    x = torch.tensor([[-1e38, -1e30, -1e10, -100.0, -89.0, -88.0]]).repeat(4, 1)
    zero, one = torch.zeros(6), torch.ones(6)
    for activation in ("silu", "sigmoid"):
        y = functional.batch_norm(x, zero, one, activation=activation, backend="fused")
        assert (y.abs() <= 1e-36).all()


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
        gradients = kernel.backward(y, x, None, None, y, None, saved, 1, residual_needed=True)
        assert [g.shape for g in gradients] == [x.shape, x.shape, (shape[1],), (shape[1],)]
        assert all((g == 0).all() for g in gradients)
        assert (kernel.gradient_sums(y, x, None, None, y, None, saved, 1) == 0).all()
    assert (kernel.moments(x) == 0).all()
    assert (mean == 0).all()
    assert (var == 1).all()
    assert batches == 0


# Inputs so large that outputs go past the caches, and that what is needed next is read ahead; where that begins
# depends on the processor: at 1 or 5 MiB, and at 4 or 20.

FAR = {
    "planes in tiles": (8, 128, 48, 49),
    "channels larger than a tile": (8, 6, 200, 224),
    "rows": (49_000, 130),
    "just beyond, planes of odd size": (64, 100, 7, 7),
    "just beyond, rows": (2100, 128),
    "just beyond, columns in tiles": (70, 4500),
    "beyond 5 MiB, planes of odd size": (96, 300, 7, 7),
    "beyond 5 MiB, rows": (10_500, 130),
}


@pytest.mark.parametrize("place", FAR)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("threads", [1, 2])
def test_inputs_beyond_the_caches_follow_the_formula(place: str, with_residual: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    x, residual, gradient = (torch.randn(FAR[place]) for _ in range(3))
    weight, bias = (torch.randn(x.shape[1]) for _ in range(2))

    def found(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        if dtype == torch.float32:
            added = residual if with_residual else None
            y = functional.batch_norm(
                leaves[0], None, None, *leaves[1:], True, activation="relu", residual=added, backend="fused"
            )
        else:
            y = torch.nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], True)
            y = (y + residual if with_residual else y).relu()
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(dtype))]

    off = 4 * torch.finfo(torch.float32).eps * math.sqrt(x.numel() / x.shape[1])  # of sums of numbers near 1
    # The kernel may find a number on the other side of the ReLU's edge, if it is within a rounding of it.
    for mine, exact, allowed in zip(found(torch.float32), found(torch.float64), (1e-5, 1e-5, off, off), strict=True):
        wrong = (mine - exact).abs() > allowed * (1 + exact.abs())
        assert wrong.sum() <= 2, (mine - exact).abs().max()


# The same bits.

LARGE = {
    "rows": (3000, 40),
    "long rows": (130, 2100),
    "tiles of rows": (40, 4500),
    "planes": (20, 13, 17, 19),
    "few large planes": (3, 2, 190, 191),
    "past the cache": (8, 6, 200, 224),
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
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    room = torch.empty(x.numel() + 1)[1:]  # one number away from where vectors begin
    elsewhere = room.as_strided(x.shape, x.stride(), 1).copy_(x)
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
