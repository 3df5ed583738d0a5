"""Centering alone and rescaling alone: numpy's numbers, their composition, and the layers' state, modes and dtypes."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchlab.nn as ours
from batchlab import functional
from tests.cases import CASE_IDS, CASES, Case

SHAPES = {1: (6, 4), 2: (6, 4, 3, 3), 3: (6, 4, 2, 3, 3)}
KEYS = {
    "MeanOnlyBatchNorm": ("bias", "running_mean", "num_batches_tracked"),
    "VarianceOnlyBatchNorm": ("weight", "bias", "running_var", "num_batches_tracked"),
}
NAMES = [f"{mechanism}{dimensions}d" for mechanism in KEYS for dimensions in SHAPES]
FLAT = [f"{mechanism}1d" for mechanism in KEYS]


def make(name: str, **options: Any) -> Any:
    return getattr(ours, name)(4, **options)


def batch(name: str, seed: int = 0) -> Tensor:
    return torch.randn(SHAPES[int(name[-2])], generator=torch.Generator().manual_seed(seed)) * 2 + 1


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_numbers_and_gradients_of_numpy(case: Case) -> None:
    x = case.input().requires_grad_()
    dtype = torch.promote_types(case.dtype, torch.float32)
    g = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    rows, grads = (
        t.detach().double().movedim(1, -1).reshape(-1, x.shape[1]).numpy().astype(np.longdouble) for t in (x, g)
    )
    mean, var = rows.mean(0), rows.var(0)
    scale = 1 / np.sqrt(var + np.longdouble(case.eps))
    # y = x · scale: scale is in front of every x, and depends on each through the variance.
    through = -(scale**3) * (rows - mean) / len(rows) * (grads * rows).sum(0)
    exact = {
        "mean": (rows - mean, grads - grads.mean(0)),
        "variance": (rows * scale, grads * scale + through),
    }
    running_mean, running_var = torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)
    found = {
        "mean": functional.mean_only_batch_norm(x, running_mean, None, True, 1.0),
        "variance": functional.variance_only_batch_norm(x, running_var, None, None, True, 1.0, case.eps),
    }
    # Both gradients are differences of terms of these sizes; so is a centered value of two values that are rounded.
    sizes = {
        "mean": (1.0, float(np.abs(grads).max())),
        "variance": (float(np.abs(rows * scale).max()), float(np.abs(grads * scale).max() + np.abs(through).max())),
    }
    sizes["mean"] = (float(np.abs(rows - mean).max()), sizes["mean"][1])
    # Roundings of the statistics' dtype: a few in the output; in the gradient those of a sum over the batch.
    roundings = (8, 8 * math.sqrt(len(rows)))
    for name, y in found.items():
        (gradient,) = torch.autograd.grad(y, x, g)
        assert y.dtype == gradient.dtype == x.dtype
        for value, wanted, size, count in zip((y, gradient), exact[name], sizes[name], roundings, strict=True):
            error = np.abs(value.detach().double().movedim(1, -1).reshape(rows.shape).numpy() - wanted)
            own = torch.finfo(case.dtype).eps
            assert float(error.max()) <= (2 * own + count * torch.finfo(dtype).eps) * size, name
    error = np.abs(running_mean.double().numpy() - mean)
    assert (error <= 4 * torch.finfo(dtype).eps * (np.abs(mean) + np.sqrt(var))).all()
    np.testing.assert_allclose(running_var.double().numpy(), rows.var(0, ddof=1).astype(float), rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("dimensions", SHAPES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_after_the_other_is_batch_norm(dimensions: int, momentum: float | None) -> None:
    torch.manual_seed(0)
    mean_only = getattr(ours, f"MeanOnlyBatchNorm{dimensions}d")(4, momentum, affine=False).double()
    variance_only = getattr(ours, f"VarianceOnlyBatchNorm{dimensions}d")(4, momentum=momentum).double()
    whole = getattr(nn, f"BatchNorm{dimensions}d")(4, momentum=momentum).double()
    with torch.no_grad():
        variance_only.weight.copy_(torch.randn(4))
        variance_only.bias.copy_(torch.randn(4))
        whole.weight.copy_(variance_only.weight)
        whole.bias.copy_(variance_only.bias)
    for seed in range(3):
        x = (100 + batch(f"{dimensions}d", seed).double()).requires_grad_()
        y, expected = variance_only(mean_only(x)), whole(x)
        torch.testing.assert_close(y, expected)
        found, wanted = (torch.autograd.grad(value.pow(3).sum(), x)[0] for value in (y, expected))
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(mean_only.running_mean, whole.running_mean)
    torch.testing.assert_close(variance_only.running_var, whole.running_var)
    x = batch(f"{dimensions}d", 9).double() + 100
    torch.testing.assert_close(variance_only.eval()(mean_only.eval()(x)), whole.eval()(x))


def test_what_each_leaves_alone() -> None:
    torch.manual_seed(1)
    x = torch.randn(50, 4, dtype=torch.float64) * 3 + 5
    centered, rescaled = ours.MeanOnlyBatchNorm1d(4).double()(x), ours.VarianceOnlyBatchNorm1d(4).double()(x)
    torch.testing.assert_close(centered.var(0), x.var(0))
    torch.testing.assert_close(centered.mean(0), torch.zeros(4).double())
    torch.testing.assert_close(rescaled.mean(0), x.mean(0) / (x.var(0, correction=0) + 1e-5).sqrt())
    shifted = ours.MeanOnlyBatchNorm1d(4).double()(x + 7)
    torch.testing.assert_close(shifted, centered)
    mirrored = ours.VarianceOnlyBatchNorm1d(4, eps=1e-12).double()(-2 * x)
    torch.testing.assert_close(mirrored, -rescaled, rtol=1e-5, atol=0)


def test_gradients_of_first_and_second_order() -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, b: functional.mean_only_batch_norm(x, None, b, True), (x, bias))
        assert check(lambda x, w, b: functional.variance_only_batch_norm(x, None, w, b, True), (x, weight, bias))


def test_works_with_weight_norm_and_ignores_the_bias_in_front() -> None:
    torch.manual_seed(3)
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    model = nn.Sequential(linear, ours.MeanOnlyBatchNorm1d(3))
    y = model(torch.randn(6, 4))
    y.square().sum().backward()
    torch.testing.assert_close(linear.bias.grad, torch.zeros(3), rtol=0, atol=1e-5)
    assert linear.parametrizations.weight.original1.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_state_is_the_part_of_torchs_that_exists(name: str) -> None:
    layer, stock = make(name), getattr(nn, f"BatchNorm{name[-2:]}")(4)
    assert sorted(layer.state_dict()) == sorted(KEYS[name[:-2]])
    stock(batch(name))
    layer(batch(name))
    for key in KEYS[name[:-2]]:
        torch.testing.assert_close(layer.state_dict()[key], stock.state_dict()[key])
    layer.load_state_dict({key: stock.state_dict()[key] for key in KEYS[name[:-2]]}, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(stock.state_dict(), strict=True)  # another function


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_resumes_bit_for_bit(name: str) -> None:
    layer = make(name, momentum=None)
    for seed in range(3):
        layer(batch(name, seed))
    resumed = make(name, momentum=None)
    resumed.load_state_dict(state(layer))
    others = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), resumed)
    for seed in range(3, 5):
        y = layer(batch(name, seed))
        for other in others:
            assert torch.equal(other(batch(name, seed)), y)
            assert same(other.state_dict(), layer.state_dict())
            assert repr(other) == repr(layer)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_takes_one_sample_and_changes_nothing(name: str) -> None:
    layer = make(name)
    layer(batch(name))
    before = state(layer.eval())
    torch.testing.assert_close(layer(batch(name)[:1]), layer(batch(name))[:1])
    assert same(state(layer), before)


@pytest.mark.parametrize("name", FLAT)
def test_the_two_switches(name: str) -> None:
    layer = make(name)
    layer(batch(name))
    expected = layer.eval()(batch(name, 1))
    trained = copy.deepcopy(layer).train()
    at_once = trained(batch(name, 1))
    layer.train()
    layer.statistics = "running"
    torch.testing.assert_close(layer(batch(name, 1)), expected, rtol=0, atol=0)
    assert same(state(layer), state(trained))  # moved all the same
    layer.update_statistics = False
    before = state(layer)
    layer(100 * batch(name, 2))
    assert same(state(layer), before)
    layer.statistics = "batch"
    assert torch.equal(layer.eval()(batch(name, 1)), at_once)
    assert same(state(layer), before)
    assert "statistics='batch', update_statistics=False" in repr(layer)
    with pytest.raises(ValueError, match="statistics is 'no'"):
        layer.statistics = "no"
    with pytest.raises(ValueError, match="track_running_stats=False"):
        make(name, track_running_stats=False).statistics = "running"


@pytest.mark.parametrize("name", FLAT)
def test_without_running_statistics_evaluation_uses_the_batch(name: str) -> None:
    layer = make(name, track_running_stats=False, affine=False)
    assert not layer.state_dict()
    expected = layer(batch(name))
    assert torch.equal(layer.eval()(batch(name)), expected)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_stay_float32_in_half_precision(name: str, dtype: torch.dtype) -> None:
    x = batch(name).to(dtype)
    wide = make(name)
    expected = wide(x.float())
    for layer in (make(name).to(dtype), make(name, dtype=dtype)):
        assert layer.bias.dtype == dtype
        y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.01, atol=0.01)
        assert layer.running.dtype == torch.float32
        torch.testing.assert_close(layer.running, wide.running)
        assert layer.eval()(x).dtype == dtype
    assert make(name).double().half().running.dtype == torch.float64
    assert all(tensor.is_meta for tensor in make(name, device="meta").state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_empty_single_and_oddly_laid_out_batches(name: str) -> None:
    layer = make(name)
    before = state(layer)
    assert layer(batch(name)[:0]).shape == (0, *batch(name).shape[1:])
    with pytest.raises(ValueError, match="one value per channel"):
        layer(torch.zeros(1, 4, *[1] * (int(name[-2]) - (name[-2] == "1"))))
    with pytest.raises(ValueError, match="expected"):
        layer(torch.zeros(2, 4, 2, 2, 2, 2))
    assert same(state(layer), before)
    x = batch(name)
    expected = make(name)(x)
    spread = torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    torch.testing.assert_close(make(name)(spread), expected)
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if memory_format is not None:
        y = make(name)(x.contiguous(memory_format=memory_format))
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", FLAT)
def test_nonfinite_batches(name: str) -> None:
    poisoned = batch(name)
    poisoned[0, 1] = math.nan
    layer = make(name, nonfinite="skip")
    before = layer.running.clone()
    layer(poisoned)
    assert layer.running[1] == before[1]
    assert (layer.running != before).tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match=r"non-finite batch statistics in 1 of 4 channels \(1\)"):
        make(name, nonfinite="raise")(poisoned)
    for options in ({"nonfinite": "no"}, {"momentum": -1.0}):
        with pytest.raises(ValueError, match=r"allowed|momentum"):
            make(name, **options)


def test_the_functions_need_what_they_use() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="give running_mean"):
        functional.mean_only_batch_norm(x, None)
    with pytest.raises(ValueError, match="give running_var"):
        functional.variance_only_batch_norm(x, None)
    with pytest.raises(ValueError, match="running_var has shape"):
        functional.variance_only_batch_norm(x, torch.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{mechanism}2d" for mechanism in KEYS])
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    eager = make(name)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        torch.testing.assert_close(compiled(batch(name, seed)), eager(batch(name, seed)))
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)
