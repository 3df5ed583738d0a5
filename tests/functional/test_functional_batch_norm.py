"""The function: parity with float64 on awkward inputs, options, masks, gradients, errors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab.functional import batch_norm, update_running_statistics
from tests.batch_norm_tables import ACTIVATIONS
from tests.cases import CASE_IDS, CASES, Case

NAMES = ("output", "grad_x", "grad_weight", "grad_bias", "running_mean", "running_var")
MOMENTUM = 0.3


def output_gradient(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The same numbers for every dtype: those that `dtype` can hold."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def run_batch_norm(function: Any, case: Case, **options: Any) -> dict[str, Tensor]:
    """Output, gradients and running statistics as `function` computes them in the case's dtype."""
    x = case.input().requires_grad_()
    statistics = torch.promote_types(case.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(statistics).requires_grad_() for p in case.affine_parameters())
    mean, var = torch.zeros(x.shape[1], dtype=statistics), torch.ones(x.shape[1], dtype=statistics)
    y = function(x, mean, var, weight, bias, True, MOMENTUM, case.eps, **options)
    y.backward(output_gradient(y.shape, case.dtype))
    values = (y, x.grad, None if weight is None else weight.grad, None if bias is None else bias.grad, mean, var)
    return {name: v.detach().double() for name, v in zip(NAMES, values, strict=True) if v is not None}


def exact_batch_norm(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same in numpy's extended precision, by section 3 of the paper; and the size of the numbers it is a sum of."""
    x = case.input().double().movedim(1, -1).reshape(-1, case.input().shape[1]).numpy().astype(np.longdouble)
    gradient = output_gradient(case.input().shape, case.dtype).double()
    g = gradient.movedim(1, -1).reshape(x.shape).numpy().astype(np.longdouble)
    weight, bias = (None if p is None else p.numpy().astype(np.longdouble) for p in case.affine_parameters())
    gamma, beta = np.longdouble(1) if weight is None else weight, np.longdouble(0) if bias is None else bias
    n = len(x)
    mean, var = x.mean(0), x.var(0)
    s = np.sqrt(var + np.longdouble(case.eps))
    normalized = (x - mean) / s
    grad_x = gamma / s * (g - g.mean(0) - normalized * (g * normalized).mean(0))

    def whole(values: np.ndarray) -> Tensor:
        moved = case.input().movedim(1, -1)
        return torch.from_numpy(values.astype(np.float64)).view(moved.shape).movedim(-1, 1)

    values = {
        "output": whole(gamma * normalized + beta),
        "grad_x": whole(grad_x),
        "running_mean": torch.from_numpy((MOMENTUM * mean).astype(np.float64)),
        "running_var": torch.from_numpy((1 - MOMENTUM + MOMENTUM * var * n / (n - 1)).astype(np.float64)),
    }
    if weight is not None:
        values["grad_weight"] = torch.from_numpy((g * normalized).sum(0).astype(np.float64))
        values["grad_bias"] = torch.from_numpy(g.sum(0).astype(np.float64))
    sizes = {name: float(value.abs().max()) for name, value in values.items()}
    # These two can cancel: the terms of a mean, and the three terms of the input's gradient.
    sizes["running_mean"] = float(np.sqrt((x**2).mean()))
    sizes["grad_x"] = float((np.abs(gamma) / s * np.abs(g)).max())
    return values, sizes


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().nan_to_num(math.inf).max())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_within_twice_the_error_of_torch(case: Case, backend: str) -> None:
    exact, sizes = exact_batch_norm(case)
    theirs = run_batch_norm(F.batch_norm, case)
    ours = run_batch_norm(batch_norm, case, backend=backend)
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        dtype = case.dtype if name in ("output", "grad_x") else torch.promote_types(case.dtype, torch.float32)
        floor = 4 * torch.finfo(dtype).eps * sizes[name]  # a few roundings of the terms themselves
        assert error(ours[name], value) <= 2 * error(theirs[name], value) + floor, name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_ten_times_closer_than_channels_last_torch_at_mean_1e3(
    backend: str, memory_format: torch.memory_format, training: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 14, 14) + 1e3
    running = (x.mean((0, 2, 3)), x.var((0, 2, 3)))
    exact = F.batch_norm(x.double(), *(r.double() for r in running), training=training, momentum=0.0)
    theirs = F.batch_norm(x.contiguous(memory_format=torch.channels_last), None, None, training=True)
    exact_training = F.batch_norm(x.double(), None, None, training=True)
    copies = [r.clone() for r in running]
    ours = batch_norm(x.contiguous(memory_format=memory_format), *copies, training=training, backend=backend)
    assert 10 * error(ours.double(), exact) <= error(theirs.double(), exact_training)


def test_constant_channels_give_exactly_the_bias() -> None:
    y = batch_norm(torch.full((8, 3, 5, 5), 1.2e8), None, None, torch.ones(3), torch.tensor([1.0, 2.0, 3.0]), True)
    assert torch.equal(y, torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).expand(y.shape))


@pytest.mark.parametrize("backend", ["auto", "reference", "aten"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_normalize_then_add_then_activate(
    activation: str | None, with_residual: bool, training: bool, backend: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    results = []
    for ours in (True, False):
        mean, var = torch.randn(4, dtype=torch.float64) * 0 + 0.5, torch.full((4,), 2.0, dtype=torch.float64)
        if ours:
            y = batch_norm(
                x, mean, var, weight, bias, training, activation=activation, residual=residual, backend=backend
            )
        else:
            y = F.batch_norm(x, mean, var, weight, bias, training)
            y = ACTIVATIONS[activation](y if residual is None else y + residual)
        inputs = [t for t in (x, residual, weight, bias) if t is not None]
        results.append([y, mean, var, *torch.autograd.grad(y.sin().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("backend", "with_mask"), [("auto", False), ("reference", False), ("reference", True)])
def test_gradients_to_third_order(backend: str, with_mask: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True], [True], [False], [True], [True]]) if with_mask else None

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, bias, True, activation="sigmoid", mask=mask, backend=backend)

    def gradient(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.autograd.grad(forward(x, weight, bias).square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(forward, (x, weight, bias))
    assert torch.autograd.gradgradcheck(forward, (x, weight, bias))
    assert torch.autograd.gradgradcheck(gradient, (x, weight, bias))


def test_under_torch_func() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, None, True, activation="sigmoid").square().sum()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        y = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * weight
        return torch.sigmoid(y).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x, weight), torch.func.grad(plain)(x, weight))
    torch.testing.assert_close(torch.func.hessian(loss)(x, weight), torch.func.hessian(plain)(x, weight))
    batches = torch.randn(4, 6, 3, dtype=torch.float64)
    each = torch.stack([loss(b, weight) for b in batches])
    torch.testing.assert_close(torch.func.vmap(loss, (0, None))(batches, weight), each)


MASK_SHAPES = {
    (4, 3): [(4, 1)],
    (4, 3, 6): [(4, 1, 6), (1, 1, 6), (4, 1, 1), (6,)],
    (2, 3, 4, 5): [(2, 1, 4, 5), (2, 1, 1, 5)],
}


@pytest.mark.parametrize(("shape", "mask_shape"), [(s, m) for s, masks in MASK_SHAPES.items() for m in masks])
@pytest.mark.parametrize("padding", [0.0, 1e20, math.inf, math.nan])
@pytest.mark.parametrize("activation", [None, "sigmoid", "silu"])
def test_mask_is_batch_norm_of_the_valid_entries(
    shape: tuple[int, ...], mask_shape: tuple[int, ...], padding: float, activation: str | None
) -> None:
    torch.manual_seed(3)
    mask = torch.rand(mask_shape) < 0.6
    mask.view(-1)[:2] = torch.tensor([True, False])
    full = mask.expand(shape[0], 1, *shape[2:])
    values, residual = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    g = torch.randn(shape, dtype=torch.float64)
    weight, bias = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    x = torch.where(full, values, padding).requires_grad_()
    r = torch.where(full, residual, padding).requires_grad_()
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = batch_norm(x, mean, var, weight, bias, True, activation=activation, residual=r, mask=mask)
    # A gradient of anything in the padding must not matter either.
    y.backward(torch.where(full, g, 0) if padding else g)

    def rows(t: Tensor) -> Tensor:
        return t.movedim(1, -1)[full.squeeze(1)]

    frames, frames_residual = rows(values).requires_grad_(), rows(residual).requires_grad_()
    expected_mean, expected_var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    expected = F.batch_norm(frames, expected_mean, expected_var, weight, bias, True) + frames_residual
    expected = ACTIVATIONS[activation](expected)
    expected.backward(rows(g))
    torch.testing.assert_close(rows(y), expected)
    torch.testing.assert_close(rows(x.grad), frames.grad)
    torch.testing.assert_close(rows(r.grad), frames_residual.grad)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)
    outside = ~full.expand(shape)
    assert not y[outside].any()
    assert not x.grad[outside].any()
    assert not r.grad[outside].any()


def test_mask_in_evaluation_zeroes_the_padding_only() -> None:
    x = torch.randn(4, 3, 6)
    mask = torch.rand(4, 1, 6) < 0.5
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    y = batch_norm(x, mean, var, mask=mask, activation="sigmoid")
    torch.testing.assert_close(y, torch.sigmoid(F.batch_norm(x, mean, var)) * mask)


@pytest.mark.parametrize("valid", [0, 1])
def test_too_few_valid_entries_update_nothing(valid: int) -> None:
    mask = torch.zeros(4, 1, dtype=torch.bool)
    mask[:valid] = True
    x = torch.randn(4, 2, requires_grad=True)
    mean, var, batches = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor(7)
    y = batch_norm(x, mean, var, training=True, mask=mask, num_batches_tracked=batches)
    y.square().sum().backward()
    assert (mean.tolist(), var.tolist(), batches.item()) == ([1, 2], [3, 4], 7)
    assert not y.any()
    assert not x.grad.any()


def test_all_true_mask_changes_nothing() -> None:
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(
        batch_norm(x, None, None, training=True, mask=torch.ones(5, 1, 4, dtype=torch.bool)),
        F.batch_norm(x, None, None, training=True),
    )


def test_running_average_over_all_batches_with_momentum_none() -> None:
    torch.manual_seed(0)
    mean, var, batches = torch.zeros(2), torch.ones(2), torch.tensor(0)
    seen = [torch.randn(10, 2) + k for k in range(4)]
    for x in seen:
        batch_norm(x, mean, var, training=True, momentum=None, num_batches_tracked=batches)
    torch.testing.assert_close(mean, torch.stack([x.mean(0) for x in seen]).mean(0))
    torch.testing.assert_close(var, torch.stack([x.var(0) for x in seen]).mean(0))
    assert batches.item() == 4


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("backend", ["auto", "reference", "aten"])
def test_nonfinite_skip_leaves_the_affected_channels(bad: float, backend: str) -> None:
    x = torch.randn(6, 3)
    x[2, 1] = bad
    mean, var, batches = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]), torch.tensor(0)
    expected_mean, expected_var = mean.clone(), var.clone()
    F.batch_norm(x, expected_mean, expected_var, training=True)
    batch_norm(x, mean, var, training=True, nonfinite="skip", backend=backend, num_batches_tracked=batches)
    assert (mean[1].item(), var[1].item(), batches.item()) == (2, 5, 1)
    torch.testing.assert_close(mean[[0, 2]], expected_mean[[0, 2]])
    torch.testing.assert_close(var[[0, 2]], expected_var[[0, 2]])


def test_nonfinite_skip_covers_a_variance_that_overflows() -> None:
    x = torch.randn(6, 2)
    x[:, 0] *= 1e30
    mean, var = torch.zeros(2), torch.ones(2)
    batch_norm(x, mean, var, training=True, nonfinite="skip")
    assert (mean[0].item(), var[0].item()) == (0, 1)
    assert var[1].item() != 1


def test_nonfinite_raise_names_the_channels_and_changes_nothing() -> None:
    x = torch.randn(6, 3)
    x[0, 2] = math.nan
    mean, var, batches = torch.zeros(3), torch.ones(3), torch.tensor(0)
    with pytest.raises(ValueError, match=r"1 of 3 channels \(2\)"):
        batch_norm(x, mean, var, training=True, nonfinite="raise", num_batches_tracked=batches)
    assert (mean.tolist(), var.tolist(), batches.item()) == ([0, 0, 0], [1, 1, 1], 0)


def test_nonfinite_propagate_is_torch() -> None:
    x = torch.randn(6, 2)
    x[0, 0] = math.inf
    mean, var = torch.zeros(2), torch.ones(2)
    batch_norm(x, mean, var, training=True)
    assert not mean[0].isfinite()
    assert not var[0].isfinite()
    assert mean[1].isfinite()


def test_half_precision_statistics_do_not_overflow() -> None:
    x = (torch.randn(64, 2) * 2000).half()
    mean, var = torch.zeros(2), torch.ones(2)
    y = batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(var, x.float().var(0), rtol=1e-5, atol=0)
    assert y.dtype == torch.float16
    assert var.max() > 65504


def test_update_running_statistics_is_the_update_of_batch_norm() -> None:
    x, mask = torch.randn(5, 2, 4), torch.rand(5, 1, 4) < 0.7
    results = []
    for update in (True, False):
        mean, var, batches = torch.zeros(2), torch.ones(2), torch.tensor(0)
        if update:
            update_running_statistics(x, mean, var, 0.4, mask=mask, num_batches_tracked=batches)
        else:
            batch_norm(x, mean, var, training=True, momentum=0.4, mask=mask, num_batches_tracked=batches)
        results.append(torch.cat([mean, var, batches.float().view(1)]))
    torch.testing.assert_close(*results)


def test_autograd_saves_no_live_buffer() -> None:
    # DDP broadcasts buffers in place between two forwards; a saved one would break the first one's backward.
    x = torch.randn(4, 2, requires_grad=True)
    weight = torch.ones(2, requires_grad=True)
    for training in (True, False):
        mean, var = torch.zeros(2), torch.ones(2)
        y = batch_norm(x, mean, var, weight, None, training)
        mean.add_(1)
        var.mul_(2)
        y.sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    for training in (True, False):
        y = batch_norm(x, torch.zeros(3), torch.ones(3), training=training, activation="relu")
        assert y.is_contiguous(memory_format=memory_format)


def test_views_with_odd_strides() -> None:
    base = torch.randn(6, 9, 4)
    x = base.permute(2, 0, 1)[:, ::2, 1:]
    torch.testing.assert_close(
        batch_norm(x, None, None, training=True), F.batch_norm(x.contiguous(), None, None, training=True)
    )


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 4, 4)])
def test_empty_batches_pass_through_and_count_nothing(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    mean, var, batches = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), torch.tensor(2)
    y = batch_norm(x, mean, var, weight, None, True, num_batches_tracked=batches)
    y.sum().backward()
    assert y.shape == shape
    assert (mean.tolist(), var.tolist(), batches.item()) == ([1, 2, 3], [1, 1, 1], 2)
    assert not weight.grad.any()


X = torch.zeros(4, 3, 2)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(3)}, ValueError, r"x has shape \(3\).*needs \(N, C"),
    ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "torch.int64.*floating-point"),
    ({"x": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, "complex64"),
    ({"weight": torch.ones(4)}, ValueError, r"weight has shape \(4\).*3 channels"),
    ({"running_mean": torch.ones(2), "running_var": torch.ones(2)}, ValueError, "running_mean has shape"),
    ({"running_mean": torch.ones(3)}, ValueError, "running_var is None"),
    ({"training": False}, ValueError, "give running_mean and running_var"),
    ({"activation": "gelu"}, ValueError, "activation is 'gelu'; allowed"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite is 'ignore'; allowed"),
    ({"backend": "cuda"}, ValueError, "backend is 'cuda'; allowed"),
    ({"momentum": 1.5}, ValueError, "momentum is 1.5"),
    ({"momentum": math.nan}, ValueError, "momentum is nan"),
    ({"residual": torch.zeros(4, 3)}, ValueError, "residual has shape"),
    ({"mask": torch.ones(4, 2, dtype=torch.bool)}, ValueError, r"mask has shape \(4, 2\).*unsqueeze\(1\)"),
    ({"mask": torch.ones(4, 3, 2, dtype=torch.bool)}, ValueError, "must broadcast to"),
    ({"mask": torch.ones(4, 1, 2)}, TypeError, "must be bool"),
    ({"mask": torch.ones(4, 1, 2, dtype=torch.bool), "backend": "aten"}, ValueError, "takes no mask"),
    ({"x": torch.zeros(1, 3)}, ValueError, "one value per channel.*eval"),
    ({"process_group": object()}, ValueError, "not initialized"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_errors_say_what_was_given_and_what_to_do(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        batch_norm(**{"x": X, "running_mean": None, "running_var": None, "training": True} | arguments)


def test_momentum_none_needs_a_counter_and_changes_nothing_without() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="num_batches_tracked"):
        batch_norm(torch.randn(4, 3), mean, var, training=True, momentum=None)
    assert not mean.any()
