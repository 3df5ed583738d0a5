"""The fused batch norm on the CPU against autograd in float64, on inputs that hurt."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab import functional, nn
from batchlab.kernels import batch_norm as kernel
from tests.batch_norm_tables import ACTIVATIONS, FLOOR

pytestmark = pytest.mark.skipif(not kernel.available(), reason="there is no C++ compiler")

# Rows that fill vectors and rows that do not, planes smaller than a vector, with a rest, and of several pieces.
SHAPES = [
    (60, 100),
    (2, 3),
    (61, 100),
    (300, 3),
    (130, 1),
    (257, 1040),
    (131, 33),
    (70, 250),
    (7, 33, 1),
    (4, 5, 3),
    (3, 5, 7, 7),
    (4, 130, 2, 2),
    (2, 20, 9, 9),
    (5, 20, 14, 14),
    (2, 3, 70, 71),
    (3, 7, 4, 5, 6),
    (1, 2, 130, 130),
]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LAYOUTS = [(shape, torch.contiguous_format) for shape in SHAPES]
LAYOUTS += [(shape, LAST[len(shape)]) for shape in SHAPES if len(shape) in LAST]
NAMES = [f"{'x'.join(map(str, shape))}{'' if kind is torch.contiguous_format else '-last'}" for shape, kind in LAYOUTS]


def _exact(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str | None, gradient: Tensor
) -> list[Tensor]:
    """Output and gradients, from a formula of its own in float64."""
    leaves = [
        t.detach().double().requires_grad_() for t in (x, weight, bias, *([] if residual is None else [residual]))
    ]
    dims, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
    mean = leaves[0].mean(dims, keepdim=True)
    var = (leaves[0] - mean).pow(2).mean(dims, keepdim=True)
    y = (leaves[0] - mean) / (var + 1e-5).sqrt() * leaves[1].view(shape) + leaves[2].view(shape)
    y = ACTIVATIONS[activation](y if residual is None else y + leaves[3])
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.double())]


def _torch(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str | None, gradient: Tensor
) -> list[Tensor]:
    """The same by torch's operations in x's own dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, *([] if residual is None else [residual]))]
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.0, 1e-5)
    y = ACTIVATIONS[activation](y if residual is None else y + leaves[3])
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def _ours(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str | None, gradient: Tensor
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, *([] if residual is None else [residual]))]
    y = functional.batch_norm(
        leaves[0],
        None,
        None,
        leaves[1],
        leaves[2],
        True,
        activation=activation,
        residual=None if residual is None else leaves[3],
        backend="fused",
    )
    assert y.stride() == x.stride()
    assert y.dtype == x.dtype
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def _worst(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


def _check(x: Tensor, residual: Tensor | None, activation: str | None) -> None:
    channels = x.shape[1]
    weight, bias = torch.randn(channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    gradient = torch.empty_like(x).copy_(torch.randn(x.shape))
    arguments = (x, weight.to(dtype), bias.to(dtype), residual, activation, gradient)
    for ours, theirs, exact in zip(_ours(*arguments), _torch(*arguments), _exact(*arguments), strict=True):
        allowed = 2 * _worst(theirs, exact) + FLOOR[x.dtype] * max(1.0, float(exact.abs().max()))
        assert _worst(ours, exact) <= allowed


@pytest.mark.parametrize(("shape", "kind"), LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_output_and_gradients(shape: tuple[int, ...], kind: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=kind)
    residual = torch.empty_like(x).copy_(torch.randn(shape))
    for number, activation in enumerate(ACTIVATIONS):
        _check(x, None, activation)
        if dtype is torch.float32 or number % 2 == len(shape) % 2:
            _check(x, residual, activation)


@pytest.mark.parametrize(("shape", "kind"), LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_large_mean_costs_no_digits(shape: tuple[int, ...], kind: torch.memory_format, mean: float) -> None:
    x = (torch.randn(shape) + mean).contiguous(memory_format=kind)
    ones, zeros = torch.ones(shape[1]), torch.zeros(shape[1])
    found = _ours(x, ones, zeros, None, None, torch.randn(shape).contiguous(memory_format=kind))[0]
    exact = _exact(x, ones, zeros, None, None, torch.zeros(shape))[0]
    # x - mean is a difference of numbers of mean's size: that is as close as float32 can say what x is.
    assert _worst(found, exact) <= 2e-6 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("last", [False, True])
def test_no_order_of_the_numbers_spoils_the_pivot(last: bool) -> None:
    x = torch.randn(8, 3, 24, 24) + 1e4
    x[0] = 0  # where the pivot is looked for
    x[:2, 1] = -1e6
    x[:, 2] = torch.linspace(-5e3, 5e3, 8 * 576).view(8, 24, 24)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    _check(x, None, None)
    mean, var = torch.zeros(3), torch.ones(3)
    functional.batch_norm(x, mean, var, training=True, momentum=1.0, backend="fused")
    exact = x.double().transpose(0, 1).flatten(1)
    assert ((mean.double() - exact.mean(1)).abs() <= 1e-7 * (exact.std(1) + exact.mean(1).abs())).all()
    torch.testing.assert_close(var.double(), exact.var(1), rtol=3e-6, atol=0.0)


@pytest.mark.parametrize("shape", [(40, 6), (5, 6, 7, 7)])
def test_a_constant_channel_has_variance_zero(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    x[:, 2] = 1234.5678
    mean, var = torch.zeros(6), torch.ones(6)
    y = functional.batch_norm(x, mean, var, training=True, momentum=1.0, backend="fused")
    assert var[2] == 0
    assert mean[2] == torch.tensor(1234.5678)
    assert (y[:, 2] == 0).all()


@pytest.mark.parametrize("shape", [(64, 4), (6, 4, 5, 5)])
@pytest.mark.parametrize("scale", [1e30, 1e-38])
def test_squares_beyond_float(shape: tuple[int, ...], scale: float) -> None:
    x = torch.randn(shape) * scale
    y = functional.batch_norm(x, None, None, training=True, eps=0.0, backend="fused")
    exact = _exact(x.double() / scale, torch.ones(4), torch.zeros(4), None, None, torch.zeros(shape))[0]
    torch.testing.assert_close(y.double(), exact, rtol=2e-4, atol=2e-4)  # the exact one has eps 1e-5 beside 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(40, 5), (6, 5, 5, 5), (3, 5, 3)])
def test_a_bad_number_stays_in_its_channel(shape: tuple[int, ...], bad: float) -> None:
    x = torch.randn(shape, requires_grad=True)
    with torch.no_grad():
        x[1, 3].fill_(bad)
    clean = x.detach().clone()
    clean[1, 3] = 0.5
    results = []
    for values in (x, clean.requires_grad_()):
        y = functional.batch_norm(values, None, None, training=True, activation="relu", backend="fused")
        (gradient,) = torch.autograd.grad(y, values, torch.ones_like(y))
        results.append((y.detach(), gradient))
    others = [0, 1, 2, 4]
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine[:, others], theirs[:, others])
    assert results[0][0][:, 3].isnan().any()


@pytest.mark.parametrize("shape", [(1000, 40), (9, 3, 50, 50), (64, 200, 7, 7)])
def test_any_number_of_threads(shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape), torch.randn(shape)
    arguments = (x, torch.rand(shape[1]), torch.rand(shape[1]), residual, "silu", torch.randn(shape))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(_ours(*arguments))
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_results_too_large_for_the_cache_are_the_same(last: bool) -> None:
    kind = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(4, 32, 224, 224).contiguous(memory_format=kind)  # 26 MB: written past the cache
    gradient = torch.randn(4, 32, 224, 224).contiguous(memory_format=kind)
    one = torch.ones(32)
    whole = _ours(x, one, one, None, "relu", gradient)
    parts = [
        _ours(x[:, c : c + 1].contiguous(), one[:1], one[:1], None, "relu", gradient[:, c : c + 1].contiguous())
        for c in (0, 31)
    ]
    for c, part in zip((0, 31), parts, strict=True):
        torch.testing.assert_close(whole[0][:, c : c + 1], part[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(whole[1][:, c : c + 1], part[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_a_residual_in_and_past_the_caches(last: bool) -> None:
    kind = torch.channels_last if last else torch.contiguous_format
    for side in (10, 56):  # 0.1 MB, 4 MB
        x, residual = (torch.randn(8, 40, side, side).contiguous(memory_format=kind) for _ in range(2))
        _check(x, residual, "relu")


@pytest.mark.parametrize("shape", [(60, 100), (4, 9, 7, 7), (4, 6, 30, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "sigmoid"])
def test_a_residual_without_a_gradient_changes_no_bit_of_the_others(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str
) -> None:
    x, residual, gradient = (torch.randn(shape, dtype=dtype) for _ in range(3))
    weight, bias = torch.randn(shape[1], dtype=dtype), torch.randn(shape[1], dtype=dtype)
    found = []
    for needed in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        added = residual.clone().requires_grad_(needed)
        y = functional.batch_norm(
            leaves[0], None, None, *leaves[1:], True, activation=activation, residual=added, backend="fused"
        )
        found.append(torch.autograd.grad(y, [*leaves, added] if needed else leaves, gradient)[:3])
    assert all(torch.equal(without, wanted) for without, wanted in zip(*found, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients_of_gradients(activation: str | None, with_residual: bool) -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_()
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def call(*given: Tensor) -> Tensor:
        return functional.batch_norm(
            given[0],
            None,
            None,
            given[1],
            given[2],
            True,
            activation=activation,
            residual=given[3] if with_residual else None,
            backend="fused",
        )

    inputs = (x, weight, bias, residual) if with_residual else (x, weight, bias)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_strides_of_any_kind() -> None:
    base = torch.randn(6, 8, 10, 12)
    for x in (base[::2, 1:, ::3], base.permute(3, 1, 0, 2), base.transpose(2, 3), base.expand(6, 8, 10, 12)[:, :, :1]):
        mine = functional.batch_norm(x, None, None, training=True, backend="fused")
        torch.testing.assert_close(mine, functional.batch_norm(x, None, None, training=True, backend="reference"))
    layer = nn.BatchNorm1d(7, backend="fused")
    x = torch.randn(5, 9, 7).transpose(1, 2).requires_grad_()  # (N, L, C) in memory
    y = layer(x)
    assert y.stride() == x.stride()
    y.sum().backward()  # a gradient without strides of its own
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-6


def test_evaluation_is_the_formula() -> None:
    for shape, kind in LAYOUTS:
        x = torch.randn(shape).contiguous(memory_format=kind)
        residual = torch.empty_like(x).copy_(torch.randn(shape))
        mean, var, weight, bias = torch.randn(4, shape[1]).unbind()
        var = var.abs() + 0.1
        with torch.no_grad():
            for activation, apply in ACTIVATIONS.items():
                found = functional.batch_norm(
                    x, mean, var, weight, bias, activation=activation, residual=residual, backend="fused"
                )
                view = [1, -1] + [1] * (len(shape) - 2)
                scale = weight.double() / (var.double() + 1e-5).sqrt()
                exact = (x.double() - mean.double().view(view)) * scale.view(view) + bias.double().view(view) + residual
                torch.testing.assert_close(found.double(), apply(exact), rtol=1e-5, atol=1e-5)
                assert found.stride() == x.stride()


def test_running_statistics_move_as_torch_moves_them() -> None:
    ours, theirs = nn.BatchNorm2d(5, backend="fused"), torch.nn.BatchNorm2d(5)
    for _ in range(3):
        x = torch.randn(4, 5, 6, 6) * 3 + 2
        ours(x)
        theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3


def test_what_the_kernel_does_not_take_is_refused() -> None:
    x = torch.randn(6, 4)
    with pytest.raises(ValueError, match="backend='fused' takes no mask"):
        functional.batch_norm(x, None, None, training=True, mask=torch.ones(6, 1).bool(), backend="fused")
    with pytest.raises(ValueError, match="does not take this call"):
        functional.batch_norm(x[:0], None, None, training=True, backend="fused")
    with pytest.raises(ValueError, match="does not take this call"):
        functional.batch_norm(x, None, None, training=True, residual=x.double(), backend="fused")


def test_the_operation_itself_refuses_foreign_memory() -> None:
    x, vector = torch.randn(6, 4, 5, 5), torch.ones(4)
    y, saved = kernel.forward(x, vector, vector, None, None, None, None, 0.1, 1e-5, 1)
    wrong = [
        (x.permute(3, 2, 1, 0), vector, None),
        (x, torch.ones(3), None),
        (x, torch.ones(4).double(), None),
        (x, vector, x[:3]),
        (x, vector, x.double()),
        (x.int(), vector, None),
    ]
    for values, weight, residual in wrong:
        with pytest.raises(RuntimeError, match="batch_norm:"):
            kernel.forward(values, weight, vector, residual, None, None, None, 0.1, 1e-5, 1)
    with pytest.raises(RuntimeError, match="no activation"):
        kernel.forward(x, vector, vector, None, None, None, None, 0.1, 1e-5, 9)
    with pytest.raises(RuntimeError, match="saved must be"):
        kernel.backward(y, x, vector, vector, None, None, saved[:2], 1)
    with pytest.raises(RuntimeError, match="gradient must have"):
        kernel.backward(y[:2], x, vector, vector, None, None, saved, 1)


def test_waiting_memory_is_no_more_than_was_in_use_and_goes_back() -> None:
    kernel.release_memory()
    x = torch.randn(1 << 19, 2)  # 4 MB
    ones = torch.ones(2)
    held = [kernel.forward(x, ones, ones, None, None, None, None, 0.1, 1e-5, 0)[0] for _ in range(3)]
    assert kernel.release_memory() == 0
    del held
    for _ in range(5):
        kernel.forward(x, ones, ones, None, None, None, None, 0.1, 1e-5, 0)
    waiting = kernel.release_memory()
    assert 0 < waiting <= 3 * 4.7 * 2**20
    assert kernel.release_memory() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_go_on() -> None:
    x = torch.randn(1 << 16, 8)
    torch.set_num_threads(1)
    expected = functional.batch_norm(x, None, None, training=True, backend="fused")
    child = os.fork()
    if child == 0:
        found = functional.batch_norm(x, None, None, training=True, backend="fused")
        os._exit(0 if torch.equal(found, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
