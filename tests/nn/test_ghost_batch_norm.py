"""Ghost batch normalization: torch's layer on each group, whatever the batch size; pooled running statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchlab.nn as ours
from batchlab import functional
from batchlab.reference import ghost_batch_norm as reference
from tests.cases import CASE_IDS, CASES, Case

LAYERS = {2: (ours.GhostBatchNorm1d, nn.BatchNorm1d), 4: (ours.GhostBatchNorm2d, nn.BatchNorm2d)}


def expected_groups(samples: int, group_size: int, single_value: bool) -> list[list[int]]:
    """Sample by sample: fill a group, then open the next; one lonely value moves to its neighbours."""
    groups: list[list[int]] = []
    for index in range(samples):
        if not groups or len(groups[-1]) == group_size:
            groups.append([])
        groups[-1].append(index)
    if single_value and len(groups) > 1 and len(groups[-1]) == 1:
        lonely = groups.pop()
        groups[-1] += lonely
    return groups


def group_by_group(x: Tensor, groups: list[list[int]], weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for group in groups:
        y[group] = nn.functional.batch_norm(x[group], None, None, weight, bias, training=True)
    return y


def in_extended_precision(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Batch normalization by numpy, with more digits than float64 where the machine has them."""
    moved = x.double().movedim(1, -1)
    rows = moved.reshape(-1, x.shape[1]).numpy().astype(np.longdouble)
    y = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + np.longdouble(eps))
    y = y * (1 if weight is None else weight.double().numpy()) + (0 if bias is None else bias.double().numpy())
    return torch.from_numpy(y.astype(np.float64)).view(moved.shape).movedim(-1, 1)


@settings(deadline=None, max_examples=60)
@given(samples=st.integers(2, 23), group_size=st.integers(2, 12), spatial=st.booleans(), seed=st.integers(0, 99))
def test_is_batch_norm_of_each_group(samples: int, group_size: int, spatial: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, 3, 2, 3) if spatial else (samples, 3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    mine, theirs = (cls(3, dtype=torch.float64) for cls in LAYERS[x.ndim])
    mine.group_size = group_size
    with torch.no_grad():
        mine.weight.copy_(torch.tensor([1.5, -2.0, 0.0]))
        mine.bias.copy_(torch.tensor([0.3, 1.0, -1.0]))
    y = mine(x)
    found = torch.autograd.grad(y, [x, mine.weight, mine.bias], g)
    expected = group_by_group(x, expected_groups(samples, group_size, not spatial), mine.weight, mine.bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [x, mine.weight, mine.bias], g))
    theirs(x)  # pooled over groups is what the whole batch gives
    for key, value in theirs.state_dict().items():
        if "running" in key or "num" in key:
            torch.testing.assert_close(mine.state_dict()[key], value)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
@pytest.mark.parametrize("group_size", [2, 5])
def test_within_twice_the_error_of_torch(case: Case, group_size: int) -> None:
    x = case.input()
    weight, bias = case.affine_parameters()
    values = x.shape[2:].numel()
    dtype = torch.promote_types(case.dtype, torch.float32)
    statistics = torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    y = functional.ghost_batch_norm(x, *statistics, weight, bias, True, 1.0, case.eps, group_size=group_size)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    for group in expected_groups(x.shape[0], group_size, values == 1):
        exact = in_extended_precision(x[group], weight, bias, case.eps)
        theirs = nn.functional.batch_norm(x[group], None, None, weight, bias, True, 0.1, case.eps)
        floor = 4 * torch.finfo(case.dtype).eps * float(exact.abs().max())
        theirs_off = float((theirs.double() - exact).abs().nan_to_num(torch.inf).max())
        assert float((y[group].double() - exact).abs().max()) <= 2 * theirs_off + floor
    rows = x.double().movedim(1, -1).reshape(-1, x.shape[1]).numpy()
    epsilon = 8 * torch.finfo(dtype).eps
    deviations = np.abs(rows).max(0)
    assert (np.abs(statistics[0].double().numpy() - rows.mean(0)) <= epsilon * deviations + 1e-300).all()
    # A group's mean is rounded once, near its values; only what differs from it is squared.
    np.testing.assert_allclose(statistics[1].double().numpy(), rows.var(0, ddof=1), rtol=8 * epsilon, atol=1e-12)


def test_constant_groups_have_the_variance_between_them() -> None:
    x = torch.tensor([0.0] * 100 + [10.0] * 10).view(-1, 1)
    layer = ours.GhostBatchNorm1d(1, group_size=50, momentum=1.0)
    assert not layer(x).any()
    assert layer.running_mean.item() == pytest.approx(100 / 110)
    assert layer.running_var.item() == pytest.approx(np.var([0.0] * 100 + [10.0] * 10, ddof=1), rel=1e-6)


def test_digits_of_the_pooled_variance_survive_a_large_mean() -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) + 1e5
    layer = ours.GhostBatchNorm1d(5, group_size=8, momentum=1.0)
    layer(x)
    torch.testing.assert_close(layer.running_var.double(), x.double().var(0), rtol=1e-5, atol=0)


def test_group_size_at_least_the_batch_is_batch_norm_bit_for_bit() -> None:
    x = torch.randn(12, 4, 5, generator=torch.Generator().manual_seed(1))
    for group_size in (12, 13, 1000):
        mine, plain = ours.GhostBatchNorm1d(4, group_size), ours.BatchNorm1d(4)
        assert torch.equal(mine(x), plain(x))


def test_group_size_one_is_instance_norm() -> None:
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.GhostBatchNorm2d(4, 1)(x), nn.InstanceNorm2d(4)(x))
    with pytest.raises(ValueError, match="group_size=1 leaves one value per channel"):
        ours.GhostBatchNorm1d(4, 1)(torch.zeros(5, 4))


def test_samples_may_change_places_within_a_group_but_not_between() -> None:
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    layer = ours.GhostBatchNorm1d(3, group_size=4, dtype=torch.float64)
    y = layer(x)
    inside, across = [2, 0, 3, 1, 5, 4, 7, 6], [4, 1, 2, 3, 0, 5, 6, 7]
    torch.testing.assert_close(layer(x[inside]), y[inside])
    assert not torch.allclose(layer(x[across]), y[across])
    groups = [4, 5, 6, 7, 0, 1, 2, 3]
    torch.testing.assert_close(layer(x[groups]), y[groups])


def test_a_sample_reaches_its_group_alone() -> None:
    x = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    (gradient,) = torch.autograd.grad(ours.GhostBatchNorm1d(2, group_size=3)(x)[0].square().sum(), x)
    assert gradient[:3].any()
    assert not gradient[3:].any()


@pytest.mark.parametrize("samples", [4, 6, 7])
def test_gradients_of_first_and_second_order(samples: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(samples, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(*inputs: Tensor) -> Tensor:
        return functional.ghost_batch_norm(inputs[0], None, None, *inputs[1:], training=True, group_size=3)

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


def test_reference_is_the_same_function() -> None:
    x = torch.randn(11, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y, whole = reference.ghost_batch_norm(x, 4)
    torch.testing.assert_close(y, functional.ghost_batch_norm(x, None, None, training=True, group_size=4))
    torch.testing.assert_close(whole.mean, x.mean((0, 2)))


def test_works_under_torch_func() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(values: Tensor) -> Tensor:
        return functional.ghost_batch_norm(values, None, None, training=True, group_size=3).pow(3).sum()

    y = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(y), y)[0])


@pytest.mark.parametrize("group_size", [0, -1, 2.5, True, None])
def test_bad_group_sizes_are_refused(group_size: object) -> None:
    with pytest.raises(ValueError, match="group_size is"):
        ours.GhostBatchNorm1d(3, group_size)
