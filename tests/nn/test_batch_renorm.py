"""Batch renormalization: batch norm in the warm-up, evaluation where nothing is clipped, the paper's algorithm."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchlab.nn as ours
from batchlab import functional
from batchlab.reference import batch_renorm as reference

NOW = {"warmup_steps": 0, "r_max_steps": 0, "d_max_steps": 0}


def by_hand(
    rows: list[list[float]], mean: list[float], var: list[float], r_max: float, d_max: float, eps: float
) -> list[list[float]]:
    """Algorithm 1 of the paper in Python's numbers, one channel after another."""
    columns = []
    for values, running_mean, running_var in zip(zip(*rows, strict=True), mean, var, strict=True):
        mu = math.fsum(values) / len(values)
        sigma = math.sqrt(math.fsum((v - mu) ** 2 for v in values) / len(values) + eps)
        running_sigma = math.sqrt(running_var + eps)
        r = min(max(sigma / running_sigma, 1 / r_max), r_max)
        d = min(max((mu - running_mean) / running_sigma, -d_max), d_max)
        columns.append([(v - mu) / sigma * r + d for v in values])
    return [list(row) for row in zip(*columns, strict=True)]


@settings(deadline=None, max_examples=50)
@given(
    samples=st.integers(2, 9),
    r_max=st.sampled_from([1.0, 1.5, 3.0, 100.0]),
    d_max=st.sampled_from([0.0, 0.3, 5.0, 1000.0]),
    offset=st.sampled_from([0.0, 2.0, -1e3]),
    seed=st.integers(0, 99),
)
def test_is_the_papers_algorithm(samples: int, r_max: float, d_max: float, offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 1, 10.0]) + offset
    mean = torch.randn(3, generator=generator, dtype=torch.float64) + offset
    var = torch.rand(3, generator=generator, dtype=torch.float64) * 4 + 0.1
    expected = torch.tensor(by_hand(x.tolist(), mean.tolist(), var.tolist(), r_max, d_max, 1e-5), dtype=torch.float64)
    weight, bias = torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([0.5, 0.0, 3.0]).double()
    options = {"r_max": r_max, "d_max": d_max}
    for function in (
        lambda: reference.batch_renorm(x, mean, var, weight, bias, **options),
        lambda: functional.batch_renorm(x, mean.clone(), var.clone(), weight, bias, True, **options),
    ):
        torch.testing.assert_close(function(), expected * weight + bias, rtol=1e-7, atol=1e-9)


def test_is_batch_norm_bit_for_bit_in_the_warm_up() -> None:
    torch.manual_seed(0)
    mine, plain = ours.BatchRenorm2d(4, momentum=0.1, warmup_steps=3), ours.BatchNorm2d(4)
    with torch.no_grad():
        mine.weight.copy_(torch.randn(4))
        plain.weight.copy_(mine.weight)
    for step in range(4):
        results = []
        x = torch.randn(5, 4, 3, 3) * 3 + step
        for layer in (mine, plain):
            values = x.clone().requires_grad_()
            y = layer(values)
            gradients = torch.autograd.grad(y.pow(3).sum(), [values, layer.weight, layer.bias])
            results.append((y, *gradients, layer.running_mean.clone(), layer.running_var.clone()))
        # The limits at step 3, the first after the warm-up, are those of its end: still 1 and 0.
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    x = torch.randn(5, 4, 3, 3)
    assert not torch.equal(mine(x), plain(x))


def test_is_evaluation_where_nothing_is_clipped() -> None:
    torch.manual_seed(1)
    layer = ours.BatchRenorm1d(4, r_max=1e4, d_max=1e4, **NOW)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0, 0.0, 30.0]))
    layer.running_var.copy_(torch.tensor([4.0, 0.1, 1.0, 9.0]))
    for samples in (2, 3, 50):
        x = torch.randn(samples, 4) * 2 + 1
        expected = layer.eval()(x)
        torch.testing.assert_close(layer.train()(x), expected, rtol=1e-5, atol=1e-5)  # from before the update
    assert layer.running_mean[0] != 1


def test_the_correction_is_a_constant_for_the_gradient() -> None:
    torch.manual_seed(2)
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    g = torch.randn(6, 3).double()
    found = torch.autograd.grad(
        functional.batch_renorm(x, mean.clone(), var.clone(), weight, bias, True, r_max=1.2, d_max=0.4),
        [x, weight, bias],
        g,
    )
    values = x.detach()
    r = ((values.var(0, correction=0) + 1e-5) / (var + 1e-5)).sqrt().clamp(1 / 1.2, 1.2)
    d = ((values.mean(0) - mean) / (var + 1e-5).sqrt()).clamp(-0.4, 0.4)
    normalized = nn.functional.batch_norm(x, None, None, training=True)
    expected = torch.autograd.grad((normalized * r + d) * weight + bias, [x, weight, bias], g)
    torch.testing.assert_close(found, expected)

    # Frozen at a point, r and d are numbers, and what remains is differentiable to any order.
    def function(*inputs: Tensor) -> Tensor:
        return nn.functional.batch_norm(inputs[0], None, None, inputs[1] * r, inputs[1] * d + inputs[2], True)

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    torch.testing.assert_close(torch.autograd.grad(function(x, weight, bias), [x, weight, bias], g), found)


def test_second_order_gradients_agree_with_the_reference() -> None:
    torch.manual_seed(3)
    mean, var = torch.zeros(2).double(), torch.ones(2).double()
    results = []
    for function in (
        lambda x, w: reference.batch_renorm(x, mean, var, w),
        lambda x, w: functional.batch_renorm(x, mean.clone(), var.clone(), w, None, True),
    ):
        torch.manual_seed(4)
        x, weight = torch.randn(5, 2).double().requires_grad_(), torch.randn(2).double().requires_grad_()
        (first,) = torch.autograd.grad(function(x, weight).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, weight]))
    torch.testing.assert_close(results[0], results[1])


def test_schedule_of_the_paper() -> None:
    layer = ours.BatchRenorm1d(2)
    points = {0: (1, 0), 4999: (1, 0), 5000: (1, 0), 15000: (1 + 2 * 10 / 35, 2.5), 25000: (1 + 2 * 20 / 35, 5)}
    for step, expected in (points | {40000: (3, 5), 10**7: (3, 5)}).items():
        layer.num_batches_tracked.fill_(step)
        assert [limit.item() for limit in layer.limits()] == pytest.approx(expected)
    at_once = ours.BatchRenorm1d(2, warmup_steps=2, r_max_steps=2, d_max_steps=2)
    for expected in ((1, 0), (1, 0), (3, 5), (3, 5)):
        assert [limit.item() for limit in at_once.limits()] == pytest.approx(expected)
        at_once(torch.randn(4, 2))


def test_a_pause_stops_the_schedule_but_not_the_correction() -> None:
    torch.manual_seed(5)
    layer = ours.BatchRenorm1d(3, r_max=1e4, d_max=1e4, **NOW)
    layer.running_mean.fill_(4.0)
    layer.update_statistics = False
    x = torch.randn(7, 3)
    torch.testing.assert_close(layer(x), nn.functional.batch_norm(x, torch.full((3,), 4.0), torch.ones(3)))
    assert layer.num_batches_tracked.item() == 0


def test_running_statistics_follow_torch_whatever_the_correction() -> None:
    torch.manual_seed(6)
    mine, theirs = ours.BatchRenorm1d(3, momentum=0.2, **NOW), nn.BatchNorm1d(3, momentum=0.2)
    for _ in range(20):
        x = torch.randn(4, 3) * 3 + 7
        mine(x)
        theirs(x)
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    torch.testing.assert_close(mine.running_var, theirs.running_var)


def test_training_comes_closer_to_evaluation_than_batch_norm_on_small_batches() -> None:
    torch.manual_seed(7)
    apart = {}
    for cls, options in ((ours.BatchRenorm1d, NOW | {"momentum": 0.01}), (ours.BatchNorm1d, {"momentum": 0.01})):
        layer = cls(8, **options)
        layer.running_mean.fill_(3.0)
        layer.running_var.fill_(4.0)
        total = 0.0
        for _ in range(50):
            x = 2 * torch.randn(4, 8) + 3
            expected = layer.eval()(x)
            total += (layer.train()(x) - expected).square().mean().item()
        apart[cls] = total
    assert apart[ours.BatchRenorm1d] < 0.05 * apart[ours.BatchNorm1d]


def test_half_precision_stays_finite() -> None:
    layer = ours.BatchRenorm1d(2, **NOW).half()
    x = torch.tensor([[1e4, 1e-6], [3e4, 2e-6], [6e4, 0.0]], dtype=torch.float16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_max": 0.5}, "r_max is 0.5"),
        ({"r_max": math.nan}, "r_max is nan"),
        ({"d_max": -1.0}, "d_max is -1.0"),
        ({"d_max": math.inf}, "d_max is inf"),
        ({"warmup_steps": -1}, "0 <= warmup_steps"),
        ({"warmup_steps": 30000}, "0 <= warmup_steps"),
        ({"track_running_stats": False}, "track_running_stats=False"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.BatchRenorm1d(3, **options)


def test_the_function_needs_running_statistics() -> None:
    with pytest.raises(ValueError, match="give running_mean and running_var"):
        functional.batch_renorm(torch.zeros(4, 2), None, None, training=True)
    with pytest.raises(ValueError, match="r_max is 0"):
        functional.batch_renorm(torch.zeros(4, 2), torch.zeros(2), torch.ones(2), training=True, r_max=0)
