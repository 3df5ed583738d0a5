"""Batch norm's operations for the GPU, called directly: against the CPU's operations, and against float64.

Without a GPU they run in Triton's interpreter, on the CPU's tensors.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from batchlab.kernels import batch_norm as kernel
from tests.triton_kernels import (
    ACTIVATIONS,
    DEVICE,
    LAYOUTS,
    affine,
    by_channel,
    error,
    exact_statistics,
    expected,
    innermost,
    numbers,
)

if not kernel.available():
    pytest.skip("there is no C++ compiler", allow_module_level=True)

from batchlab.kernels import batch_norm_cuda as cuda

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow in the interpreter

EPS = 1e-5
MOMENTUM = 0.1
DENSE = [name for name in LAYOUTS if name != "strided"]
MAIN = ["4d", "channels-last"]
STEPS = [
    *product(MAIN, [torch.float32], ACTIVATIONS, [False, True]),
    *product([name for name in DENSE if name not in MAIN], [torch.float32], ["silu"], [True]),
    *product(MAIN, [torch.bfloat16, torch.float16, torch.float64], ["relu"], [True]),
    *product(MAIN, [torch.bfloat16], ["sigmoid"], [False]),
]


def on_cpu(*values: object) -> list[object]:
    return [value.cpu() if isinstance(value, Tensor) else value for value in values]


def alike(found: Tensor, right: Tensor, epsilons: float = 32) -> None:
    """One description and, but for so many roundings of the largest number, one value."""
    assert (found.shape, found.dtype) == (right.shape, right.dtype)
    assert found.stride() == right.stride() or right.numel() == 0
    assert found.device.type == DEVICE
    scale = max(float(right.double().abs().max()), 1.0) if right.numel() else 1.0
    tolerance = epsilons * min(torch.finfo(right.dtype).eps, 2**-7) * scale
    torch.testing.assert_close(found.cpu(), right, rtol=0, atol=tolerance, equal_nan=True)


def running(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = torch.linspace(0.5, 3.0, 2 * channels, dtype=dtype).view(2, -1).clone().to(DEVICE)
    return mean, var, torch.tensor(7, device=DEVICE)


def plain_sums(gradient: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """Σ g and Σ g (x - mean) in float64, a channel at a time."""
    rows = [
        (float(g.sum()), float((g * (values - float(m))).sum()))
        for g, values, m in zip(by_channel(gradient), by_channel(x), mean, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).T


@pytest.mark.parametrize(("layout", "dtype", "activation", "with_residual"), STEPS)
def test_a_step_is_that_of_the_cpu(
    layout: str, dtype: torch.dtype, activation: str | None, with_residual: bool
) -> None:
    """Forward, every row that is saved, running statistics, sums, and gradients: value, dtype and strides."""
    x, gradient = numbers(layout, dtype), numbers(layout, dtype, mean=0.3, seed=1)
    residual = numbers(layout, dtype, mean=0.0, seed=2) if with_residual else None
    weight, bias = affine(x.shape[1], dtype)
    moved = running(x.shape[1], weight.dtype)
    given = (x, weight, bias, residual, *moved, MOMENTUM, EPS, kernel.ACTIVATIONS[activation])
    theirs = on_cpu(*(value.clone() if isinstance(value, Tensor) else value for value in given))
    y, saved = cuda.forward(*given)
    their_y, their_saved = kernel.forward(*theirs)  # type: ignore[arg-type]
    alike(y, their_y, 4)
    if x.numel() > x.shape[1]:
        alike(saved, their_saved, 64)
    else:  # no variance: the scale is 1/√eps, and every number is the mean
        alike(saved, their_saved)
    for mine, right in zip(moved, theirs[4:7], strict=True):
        torch.testing.assert_close(mine.cpu(), right, rtol=4e-7, atol=1e-7)

    behind = with_residual and activation is not None
    output = y if behind and activation != "silu" else None
    other = residual if behind and output is None else None
    arguments = (gradient, x, weight, bias, output, other, saved)
    number = kernel.ACTIVATIONS[activation]
    their_arguments = on_cpu(*arguments)
    sums, their_sums = cuda.gradient_sums(*arguments, number), kernel.gradient_sums(*their_arguments, number)  # type: ignore[arg-type]
    assert sums.dtype == torch.float64
    assert error(sums, their_sums) <= 1e-5 * max(float(their_sums.abs().max()), 1.0)
    found = cuda.backward(*arguments, None, 0.0, number, with_residual)
    right = kernel.backward(*their_arguments, number, residual_needed=with_residual)  # type: ignore[arg-type]
    for mine, theirs_ in zip(found, right, strict=True):
        alike(mine, theirs_, 64)


@pytest.mark.parametrize("layout", ["2d", "3d", "channels-last"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_gradients_against_float64(layout: str, activation: str | None) -> None:
    x, gradient, residual = (numbers(layout, torch.float32, mean=m, seed=s) for s, m in enumerate((1e3, 0.3, 0.0)))
    weight, bias = affine(x.shape[1], x.dtype)
    number = kernel.ACTIVATIONS[activation]
    y, saved = cuda.forward(x, weight, bias, residual, None, None, None, MOMENTUM, EPS, number)
    known = (y, None) if activation == "relu" else (None, residual if activation == "silu" else None)
    of_x, of_residual, of_weight, of_bias = cuda.backward(
        gradient, x, weight, bias, *known, saved, None, 0.0, number, True
    )
    right = expected(x, weight, bias, EPS, activation, residual, gradient)
    assert error(y, right.output) <= 1e-5
    assert error(of_x, right.grad_x) <= 1e-5 * float(right.grad_x.abs().max())
    assert error(of_weight, right.grad_weight) <= 1e-5 * float(right.grad_weight.abs().max())
    assert error(of_bias, right.grad_bias) <= 1e-5 * float(right.grad_bias.abs().max())
    if activation is None:
        assert of_residual.shape == (0,)
    else:
        assert error(of_residual, right.grad_residual) <= 1e-5


@pytest.mark.parametrize("layout", MAIN)
def test_saved_rows_say_what_they_should(layout: str) -> None:
    x = numbers(layout, torch.float32, mean=1e4)
    saved = cuda.forward(x, None, None, None, None, None, None, MOMENTUM, EPS, 0)[1].cpu().double()
    mean, variance = exact_statistics(x)
    inverse = 1 / (variance + EPS).sqrt()
    rest = mean - saved[0]
    assert torch.all(rest.abs() <= 2**-24 * mean.abs())
    torch.testing.assert_close(saved[1], rest * inverse, rtol=0, atol=2e-6)
    torch.testing.assert_close(saved[2], inverse, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_move_as_a_loop_says(dtype: torch.dtype) -> None:
    """In float64 to the last digits: neither momentum nor n / (n - 1) is rounded to float32 on the way."""
    x = numbers("4d", torch.float64, mean=100.0)
    mean, var, batches = running(5, dtype)
    means, variances = exact_statistics(x)
    right = []
    for c in range(5):
        unbiased = float(variances[c]) * 168 / 167
        right.append((float(mean[c]) * 0.7 + 0.3 * float(means[c]), float(var[c]) * 0.7 + 0.3 * unbiased))
    cuda.forward(x, None, None, None, mean, var, batches, 0.3, EPS, 0)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-7
    found = torch.stack([mean, var], dim=1).double().cpu()
    torch.testing.assert_close(found, torch.tensor(right, dtype=torch.float64), rtol=tolerance, atol=0)
    assert batches.item() == 8


def test_each_running_statistic_may_be_missing() -> None:
    x = numbers("4d", torch.float32)
    mean, var, batches = running(5, torch.float32)
    cuda.forward(x, None, None, None, None, var, None, 1.0, EPS, 0)
    torch.testing.assert_close(var.cpu().double(), exact_statistics(x)[1] * 168 / 167, rtol=1e-6, atol=0)
    before = var.clone()
    cuda.forward(x, None, None, None, mean, None, batches, 1.0, EPS, 0)
    torch.testing.assert_close(mean.cpu().double(), exact_statistics(x)[0], rtol=1e-6, atol=0)
    assert torch.equal(var, before)
    assert batches.item() == 8


def test_one_value_a_channel_moves_nothing() -> None:
    x = numbers("single", torch.float32)
    moved = running(1, torch.float32)
    before = [value.clone() for value in moved]
    y, saved = cuda.forward(x, None, None, None, *moved, MOMENTUM, EPS, 0)
    assert all(map(torch.equal, moved, before))
    assert (y.item(), saved[2].item()) == (0.0, pytest.approx(EPS**-0.5))


def test_more_channels_than_one_program_has() -> None:
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 5
    moved = running(300, torch.float32)
    before = [value.cpu().clone() for value in moved]
    y, saved = cuda.forward(x, None, None, None, *moved, MOMENTUM, EPS, 1)
    their_y, their_saved = kernel.forward(x.cpu(), None, None, None, *before, MOMENTUM, EPS, 1)
    alike(y, their_y)
    alike(saved, their_saved, 64)
    for mine, right in zip(moved, before, strict=True):
        torch.testing.assert_close(mine.cpu(), right)


@pytest.mark.parametrize("layout", MAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation(layout: str, dtype: torch.dtype) -> None:
    """With statistics in either precision; gradients where the means are over infinitely many values."""
    x, gradient, residual = (numbers(layout, torch.float32, mean=m, seed=s) for s, m in enumerate((1e4, 0.3, 0.0)))
    weight, bias = affine(5, x.dtype)
    mean, variance = (value.to(DEVICE, dtype) + 0.1 for value in exact_statistics(x))
    given = (x, mean, variance, weight, bias, residual, EPS, kernel.ACTIVATIONS["relu"])
    y, saved = cuda.evaluate(*given)
    their_y, their_saved = kernel.evaluate(*on_cpu(*given))  # type: ignore[arg-type]
    alike(y, their_y)
    alike(saved, their_saved)
    found = cuda.backward(gradient, x, weight, bias, y, None, saved, None, torch.inf, 1, True)
    theirs = on_cpu(gradient, x, weight, bias, y, None, saved)
    right = kernel.backward(*theirs, 1, count=torch.inf, residual_needed=True)  # type: ignore[arg-type]
    for mine, other in zip(found, right, strict=True):
        alike(mine, other, 64)


def test_given_statistics_pass_the_gradient_whatever_x_is() -> None:
    x = torch.tensor([[1.0, float("inf")], [float("nan"), 2.0]], device=DEVICE)
    mean, variance = torch.zeros(2, device=DEVICE), torch.full((2,), 4.0, device=DEVICE)
    ones = torch.ones(2, 2, device=DEVICE)
    _, saved = cuda.evaluate(x, mean, variance, None, None, None, 0.0, 0)
    of_x, *_ = cuda.backward(ones, x, *[None] * 4, saved, None, torch.inf, 0, False)
    assert of_x.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("layout", MAIN)
def test_two_ranks_are_one_batch(layout: str) -> None:
    """Moments and sums of two halves, merged on the way, give what the whole has; and the CPU's of each half."""
    x, gradient = numbers(layout, torch.float32, mean=1e3), numbers(layout, torch.float32, mean=0.3, seed=1)
    weight, bias = affine(5, x.dtype)
    halves = [(part(x), part(gradient)) for part in (lambda t: t[:1], lambda t: t[1:])]
    found = [cuda.moments(half) for half, _ in halves]
    for (half, _), own in zip(halves, found, strict=True):
        alike(own, kernel.moments(half.cpu()), 2**33)  # sums are in float32
    (one, two), shares = found, torch.tensor([0.25, 0.75], dtype=torch.float64, device=DEVICE)
    mean = one[0] * shares[0] + two[0] * shares[1]
    variance = sum(share * (own[1] + (own[0] - mean).square()) for share, own in zip(shares, found, strict=True))
    saved = cuda.evaluate(halves[0][0], mean, variance, weight, bias, None, EPS, 1)[1]  # type: ignore[arg-type]
    parts = [cuda.gradient_sums(g, half, weight, bias, None, None, saved, 1) for half, g in halves]
    sums = torch.stack(parts).sum(0)
    right = expected(x, weight, bias, EPS, "relu", None, gradient)
    grads = [cuda.backward(g, half, weight, bias, None, None, saved, sums, 168.0, 1, False) for half, g in halves]
    of_x = torch.cat([grad[0] for grad in grads])
    assert error(of_x, right.grad_x) <= 1e-5 * float(right.grad_x.abs().max())
    for grad in grads:  # those of all ranks' sums
        assert error(grad[2], right.grad_weight) <= 1e-5 * float(right.grad_weight.abs().max())
        assert error(grad[3], right.grad_bias) <= 1e-5 * float(right.grad_bias.abs().max())


@pytest.mark.parametrize("layout", MAIN)
def test_sums_are_around_the_rounded_mean(layout: str) -> None:
    x, gradient = numbers(layout, torch.float32, mean=3e4), numbers(layout, torch.float32, mean=2.0, seed=1)
    saved = cuda.forward(x, None, None, None, None, None, None, MOMENTUM, EPS, 0)[1]
    right = plain_sums(gradient, x, saved[0].double().cpu())
    found = cuda.gradient_sums(gradient, x, *[None] * 4, saved, 0)
    assert error(found, right) <= 1e-6 * float(right.abs().max())


def test_other_strides_than_the_inputs() -> None:
    x, y_first = numbers("channels-last", torch.float32), numbers("4d", torch.float32, seed=2)
    weight, bias = affine(5, x.dtype)
    gradient = torch.full((), 0.5, device=DEVICE).expand(x.shape)
    y, saved = cuda.forward(x, weight, bias, y_first, None, None, None, MOMENTUM, EPS, 1)
    same = innermost(*x.shape)(y_first.flatten())
    right, _ = cuda.forward(x, weight, bias, same, None, None, None, MOMENTUM, EPS, 1)
    assert torch.equal(y, right)
    assert y.stride() == x.stride()
    found = cuda.backward(gradient, x, weight, bias, y.contiguous(), None, saved, None, 0.0, 1, True)
    wanted = cuda.backward(gradient.contiguous(), x, weight, bias, y, None, saved, None, 0.0, 1, True)
    assert all(map(torch.equal, found, wanted))
    assert found[0].stride() == found[1].stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5), (4, 0), (4, 0, 2, 2)])
def test_empty(shape: tuple[int, ...]) -> None:
    """As on the CPU: results of its shapes and values, nothing moved, no batch counted."""
    x, channels = torch.empty(shape, device=DEVICE), shape[1]
    moved = running(channels, torch.float32)
    before = [value.clone() for value in moved]
    y, saved = cuda.forward(x, None, None, x, *moved, MOMENTUM, EPS, 1)
    their_y, their_saved = kernel.forward(
        x.cpu(), None, None, x.cpu(), *(value.cpu() for value in before), MOMENTUM, EPS, 1
    )
    alike(y, their_y)
    alike(saved, their_saved)
    assert all(map(torch.equal, moved, before))
    alike(cuda.moments(x), kernel.moments(x.cpu()))
    alike(
        cuda.gradient_sums(x, x, None, None, x, None, saved, 1),
        kernel.gradient_sums(x.cpu(), x.cpu(), None, None, x.cpu(), None, their_saved, 1),
    )
    sums = torch.ones(2, channels, dtype=torch.float64, device=DEVICE)
    for given, count in ((None, 0.0), (None, torch.inf), *([(sums, 5.0)] if channels else [])):
        found = cuda.backward(x, x, None, None, x, None, saved, given, count, 1, True)
        other = None if given is None else given.cpu()
        right = kernel.backward(
            x.cpu(), x.cpu(), None, None, x.cpu(), None, their_saved, 1, sums=other, count=count, residual_needed=True
        )
        for mine, theirs in zip(found, right, strict=True):
            alike(mine, theirs)
    alike(
        cuda.evaluate(x, *before[:2], None, None, None, EPS, 1)[1],
        kernel.evaluate(*on_cpu(x, *before[:2], None, None, None, EPS, 1))[1],
    )  # type: ignore[arg-type]
