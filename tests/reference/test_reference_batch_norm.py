"""The formulas, against hand-worked numbers, numpy in float64 and autograd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.reference import batch_norm as reference
from tests.cases import CASE_IDS, CASES, Case


def numpy_moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.moveaxis(values, 1, -1).reshape(-1, values.shape[1]).astype(np.longdouble)
    mean = rows.mean(axis=0)
    return mean, ((rows - mean) ** 2).sum(axis=0)


def test_hand_worked_batch() -> None:
    # x = 1, 2, 6: mean 3, deviations -2, -1, 3, M2 = 14, variance 14/3, unbiased 7
    group = reference.moments(torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64))
    assert (group.count.item(), group.mean.item(), group.m2.item()) == (3, 3, 14)
    assert reference.variance(group).item() == pytest.approx(14 / 3)
    assert reference.unbiased_variance(group).item() == 7
    x = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    y = reference.normalize(x, group.mean, reference.variance(group), torch.tensor([2.0]), torch.tensor([10.0]), eps=0)
    assert y.flatten().tolist() == pytest.approx([10 + 2 * d / math.sqrt(14 / 3) for d in (-2, -1, 3)])


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_moments_match_numpy_in_extended_precision(case: Case) -> None:
    x = case.input()
    group = reference.moments(x)
    mean, m2 = numpy_moments(x.double().numpy())
    spread = np.sqrt(m2 / max(x.numel() // x.shape[1], 1)).astype(np.float64)
    epsilon = torch.finfo(group.mean.dtype).eps
    assert group.mean.dtype == reference.statistics_dtype(x.dtype)
    # A mean cannot be stored more exactly than its own rounding.
    bound = 4 * epsilon * (np.abs(mean.astype(np.float64)) + spread)
    assert (np.abs(group.mean.double().numpy() - mean.astype(np.float64)) <= bound).all()
    shifted, _ = reference.center(x)
    assert np.allclose(
        reference.moments(shifted).m2.double().numpy(), m2.astype(np.float64), rtol=64 * epsilon, atol=1e-30
    )


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    seed=st.integers(0, 1000),
)
def test_merging_groups_gives_the_moments_of_their_union(sizes: list[int], offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.randn(n, 3, generator=generator, dtype=torch.float64) + offset * k for k, n in enumerate(sizes)]
    merged = reference.moments(groups[0])
    for group in groups[1:]:
        merged = reference.merge_moments(merged, reference.moments(group))
    rows = torch.cat(groups)
    assert merged.count.item() == len(rows)
    if len(rows):
        mean, m2 = numpy_moments(rows.numpy())
        assert np.allclose(merged.mean.numpy(), mean.astype(float), rtol=1e-12, atol=1e-12)
        assert np.allclose(merged.m2.numpy(), m2.astype(float), rtol=1e-9, atol=1e-9)
    else:
        assert not merged.mean.any()
        assert not merged.m2.any()


def test_merging_is_not_averaging() -> None:
    # Two constant groups: no variance within, all of it between.
    merged = reference.merge_moments(
        reference.moments(torch.zeros(100, 1)), reference.moments(torch.full((10, 1), 10.0))
    )
    assert merged.mean.item() == pytest.approx(100 / 110)
    assert reference.variance(merged).item() == pytest.approx(np.var([0.0] * 100 + [10.0] * 10))


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("shape", [(6, 3), (4, 2, 5), (3, 2, 3, 2)])
def test_written_out_backward_is_the_derivative(shape: tuple[int, ...], with_weight: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[1], dtype=torch.float64, requires_grad=True) if with_weight else None
    bias = torch.zeros(shape[1], dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)

    def forward() -> torch.Tensor:
        group = reference.moments(x)
        return reference.normalize(x, group.mean, reference.variance(group), weight, bias)

    inputs = [t for t in (x, weight, bias) if t is not None]
    expected = torch.autograd.grad(forward(), inputs, g)
    found = [
        t for t, wanted in zip(reference.backward(g, x, weight), (x, weight, bias), strict=True) if wanted is not None
    ]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_written_out_backward_is_differentiable_itself() -> None:
    torch.manual_seed(1)
    x, g = (torch.randn(5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g, x, w: reference.backward(g, x, w), (g, x, weight))
    assert torch.autograd.gradgradcheck(lambda g, x, w: reference.backward(g, x, w), (g, x, weight))


def test_masked_moments_ignore_the_padding_whatever_it_holds() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 3, 6)
    mask = torch.rand(4, 1, 6) < 0.5
    rows = x.transpose(1, 2)[mask.squeeze(1)]
    for padding in (0.0, 1e30, math.inf, math.nan):
        group = reference.moments(torch.where(mask, x, padding), mask)
        assert group.count.item() == len(rows)
        torch.testing.assert_close(group.mean, rows.mean(0))
        torch.testing.assert_close(group.m2, rows.var(0, correction=0) * len(rows))


def test_empty_groups_have_no_moments_and_no_nan() -> None:
    for x, mask in ((torch.zeros(0, 2, 3), None), (torch.full((2, 2, 3), math.nan), torch.zeros(2, 1, 3, dtype=bool))):
        group = reference.moments(x, mask)
        assert (group.count.item(), group.mean.tolist(), group.m2.tolist()) == (0, [0, 0], [0, 0])


def test_average_over_all_batches() -> None:
    running = torch.zeros(1)
    for k, value in enumerate((3.0, 5.0, 10.0), 1):
        running = reference.average(running, torch.tensor([value]), 1 / k)
    assert running.item() == pytest.approx(6.0)


def test_normalized_batch_has_mean_zero_and_variance_one() -> None:
    # Algorithm 1: Σ x̂ = 0 and 1/m Σ x̂² = 1, neglecting eps
    x = torch.randn(50, 4, dtype=torch.float64) * 3 + 7
    group = reference.moments(x)
    y = reference.normalize(x, group.mean, reference.variance(group), eps=0.0)
    assert y.mean(0).abs().max() < 1e-14
    assert (y.square().mean(0) - 1).abs().max() < 1e-13


def test_scale_invariance_of_section_3_3() -> None:
    # BN((aW)u) = BN(Wu), its gradient in u unchanged, its gradient in W divided by a
    torch.manual_seed(3)
    u, g = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    weights = torch.randn(4, 5, dtype=torch.float64)
    results = []
    for a in (1.0, 8.0):
        scaled = (a * weights).requires_grad_()
        inputs = u.clone().requires_grad_()
        group = reference.moments(inputs @ scaled.T)
        y = reference.normalize(inputs @ scaled.T, group.mean, reference.variance(group), eps=0.0)
        results.append((y.detach(), *torch.autograd.grad(y, (inputs, scaled), g)))
    (y1, du1, dw1), (y8, du8, dw8) = results
    torch.testing.assert_close(y8, y1)
    torch.testing.assert_close(du8, du1)
    torch.testing.assert_close(dw8, dw1 / 8)
