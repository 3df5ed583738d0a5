"""Batch normalization in Triton: output and gradients against float64, in every layout, dtype and activation."""

from itertools import product

import pytest
import torch
from torch import Tensor

from batchlab.kernels import batch_norm_triton_plan as tiles
from tests.triton_kernels import (
    ACTIVATIONS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    B,
    Step,
    affine,
    error,
    expected,
    innermost,
    numbers,
    ours,
    settled,
    torchs,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow in the interpreter

EPS = 1e-5

# The interpreter takes a tenth of a second for a step: every activation in the layouts that have a path of their own,
# two in all others.
MAIN = ["2d", "4d", "channels-last"]
OTHER = [name for name in LAYOUTS if name not in MAIN]
STEPS = [
    *product(MAIN[1:], [torch.float32], ACTIVATIONS, [False, True]),
    *product([MAIN[0], *OTHER], [torch.float32], ["relu"], [False]),
    *product([MAIN[0], *OTHER], [torch.float32], ["silu"], [True]),
    *product(MAIN[1:], DTYPES[1:], ["sigmoid"], [False]),
    *product(MAIN[1:], DTYPES[1:], ["relu", "silu"], [True]),
]


def check(found: Step, right: Step, reference: Step, dtype: torch.dtype) -> None:
    """No error is above twice torch's, or a few roundings of the largest number."""
    for name in Step._fields:
        value = getattr(right, name)
        if value is None:
            assert getattr(found, name) is None
            continue
        floor = 8 * torch.finfo(dtype).eps * max(float(value.abs().max()), 1.0)
        assert error(getattr(found, name), value) <= 2 * error(getattr(reference, name), value) + floor, name


@pytest.mark.parametrize(("layout", "dtype", "activation", "residual"), STEPS)
def test_step(layout: str, dtype: torch.dtype, activation: str | None, residual: bool) -> None:
    x, grad = numbers(layout, dtype), numbers(layout, dtype, mean=0.3, seed=1)
    added = numbers(layout, dtype, mean=0.0, seed=2) if residual else None
    weight, bias = affine(x.shape[1], dtype)
    arguments = (x, weight, bias, EPS, activation, added, grad)
    found = ours(*arguments)
    check(found, expected(*arguments), torchs(*arguments), dtype)
    assert found.output.dtype == found.grad_x.dtype == dtype
    if layout != "strided":
        assert found.output.stride() == x.stride() == found.grad_x.stride()


@pytest.mark.parametrize(("layout", "tile"), [("2d", 64), ("3d", 32), ("4d", 128), ("channels-last", 128)])
def test_tiles_of_any_size_agree(layout: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many splits per channel, many blocks of channels, and pieces of planes with a short end."""
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(tiles, "RUN", 8)
    monkeypatch.setattr(tiles, "SUM_STEPS", (1, 3))
    x, grad, added = (numbers(layout, torch.float32, seed=seed) for seed in range(3))
    assert tiles.plan(x, sums=True).splits > 1
    arguments = (x, *affine(x.shape[1], x.dtype), EPS, "silu", added, grad)
    check(ours(*arguments), expected(*arguments), torchs(*arguments), x.dtype)


@pytest.mark.parametrize("layout", ["2d", "4d", "channels-last"])
def test_mean_ten_thousand_times_the_deviation(layout: str) -> None:
    """No digit is lost that x holds, although it holds three: float64 on the same x says what is right."""
    x, grad = numbers(layout, torch.float32, mean=1e4), numbers(layout, torch.float32, mean=0.0, seed=1)
    arguments = (x, *affine(x.shape[1], x.dtype), EPS, None, None, grad)
    found, right = ours(*arguments), expected(*arguments)
    for name in ("output", "grad_x", "grad_weight", "grad_bias"):
        value = getattr(right, name)
        assert error(getattr(found, name), value) <= 1e-6 * max(float(value.abs().max()), 1.0), name


def test_without_weight_and_bias() -> None:
    x, grad = numbers("4d", torch.float32), numbers("4d", torch.float32, seed=1)
    one, zero = torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    for activation in (None, "silu"):
        right = ours(x, one, zero, EPS, activation, None, grad)
        table = settled(x)
        sums = B.gradient_sums(grad, x, table, None, None, activation)
        assert torch.equal(B.apply(x, table, None, None, activation), right.output)
        assert torch.equal(sums[0], right.grad_bias)
        factors = B.settle_gradients(sums, table, 168)[2]
        found, none = B.input_gradient(grad, x, table, None, None, factors, activation)
        assert none is None
        assert torch.equal(found, right.grad_x)


def test_ranks_merge_between_the_kernels() -> None:
    """Two ranks' halves, with merged statistics, sums and count, are the whole batch."""
    x, grad = numbers("4d", torch.float64), numbers("4d", torch.float64, seed=1)
    weight, bias = affine(5, x.dtype)
    right = expected(x, weight, bias, EPS, "relu", None, grad)
    table = settled(x)
    halves = [(x[:1], grad[:1]), (x[1:], grad[1:])]
    sums = torch.stack([B.gradient_sums(g, h, table, weight, bias, "relu") for h, g in halves]).sum(0)
    for (h, g), part in zip(halves, [right.grad_x[:1], right.grad_x[1:]], strict=True):
        factors = B.settle_gradients(sums, table, 168)[2]
        found, _ = B.input_gradient(g, h, table, weight, bias, factors, "relu")
        assert error(found, part) < 1e-13


def test_other_tensors_may_have_other_strides() -> None:
    """A gradient of one expanded number, a residual in the other memory format."""
    x = numbers("channels-last", torch.float32)
    weight, bias = torch.full((5,), 0.5, device=DEVICE), affine(5, x.dtype)[1]
    grad, added = torch.ones((), device=DEVICE).expand(x.shape), numbers("4d", torch.float32, seed=2)
    found = ours(x, weight, bias, EPS, "silu", added, grad)
    right = ours(x, weight, bias, EPS, "silu", innermost(*x.shape)(added.flatten()), grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert found.output.is_contiguous(memory_format=torch.channels_last)


def test_residual_of_another_dtype() -> None:
    x, added = numbers("4d", torch.bfloat16), numbers("4d", torch.float32, seed=2)
    weight, bias = affine(5, x.dtype)
    y = B.apply(x, settled(x), weight, bias, None, added)
    right = expected(x, weight, bias, EPS, None, added, added)
    assert y.dtype == torch.bfloat16
    assert error(y, right.output) <= 2**-7 * float(right.output.abs().max())


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid"])
def test_derivative_from_output_or_from_residual(activation: str) -> None:
    x, grad, added = (numbers("3d", torch.float32, seed=seed) for seed in range(3))
    weight, bias = affine(3, x.dtype)
    table = settled(x)
    y = B.apply(x, table, weight, bias, activation, added)
    first = B.gradient_sums(grad, x, table, weight, bias, activation, output=y)
    second = B.gradient_sums(grad, x, table, weight, bias, activation, residual=added)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_relu_at_zero_and_at_nan() -> None:
    """As in torch: NaN passes, the derivative at 0 is 0, and where it is 0 not even an infinite gradient passes."""
    x = torch.tensor([[-1.0, 3.0], [1.0, float("nan")]], device=DEVICE)
    table = settled(torch.tensor([[-1.0, 3.0], [1.0, 3.0]], device=DEVICE))
    y = B.apply(x, table, None, None, "relu")
    assert y.isnan().tolist() == [[False, False], [False, True]]
    assert y[0].tolist() == [0.0, 0.0]
    zeros = torch.full((2, 2), 3.0, device=DEVICE)
    infinite = torch.full((2, 2), float("inf"), device=DEVICE)
    for known in (None, zeros - 3):
        sums = B.gradient_sums(infinite, zeros, settled(zeros), None, None, "relu", output=known)
        assert sums.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5), (4, 0), (4, 0, 2, 2)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE)
    statistics = B.moments(x)
    weight, bias = torch.ones(2, shape[1], device=DEVICE)
    assert torch.equal(statistics, torch.zeros(3, shape[1], device=DEVICE))
    table = settled(x)
    assert B.apply(x, table, weight, bias, "relu", x).shape == shape
    sums = B.gradient_sums(x, x, table, weight, bias, "relu", x)
    assert torch.equal(sums, torch.zeros(2, shape[1], device=DEVICE))
    *_, factors = B.settle_gradients(sums, table, 1)
    grads = B.input_gradient(x, x, table, weight, bias, factors, "relu", x, want_residual=True)
    assert [grad.shape for grad in grads] == [shape, shape]


def test_same_bits_again() -> None:
    x, grad = numbers("4d", torch.float32), numbers("4d", torch.float32, seed=1)
    arguments = (x, *affine(5, x.dtype), EPS, "silu", None, grad)
    first, second = ours(*arguments), ours(*arguments)
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_serves() -> None:
    def there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=DEVICE)

    assert all(B.serves(there(2, 3, dtype=dtype)) for dtype in DTYPES)
    assert not B.serves(there(2, 3, dtype=torch.int64))
    assert not B.serves(there(3))
    assert not B.serves(torch.ones(2, 3, device="meta"))
