"""The formulas of whitening, against hand-worked numbers and slow numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchlab.reference import whitening as reference
from tests.cases import CASE_IDS, CASES, Case
from tests.whitening_by_hand import (
    cholesky_by_loops,
    correlated,
    loop_covariance,
    newton_by_the_paper,
    samples_of,
)


def spread(size: int, condition: float, seed: int = 0) -> Tensor:
    """A covariance with eigenvalues from 1 down to 1/condition, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return (rotation * torch.logspace(0, -np.log10(condition), size, dtype=torch.float64)) @ rotation.mT


def test_hand_worked_matrices() -> None:
    # Eigenvectors (1, 1)/√2 and (1, -1)/√2 with eigenvalues 9 and 1: roots 1/3 and 1, W = [[2/3, -1/3], [-1/3, 2/3]].
    sigma = torch.tensor([[[5.0, 4.0], [4.0, 5.0]]], dtype=torch.float64)
    expected = torch.tensor([[[2 / 3, -1 / 3], [-1 / 3, 2 / 3]]], dtype=torch.float64)
    torch.testing.assert_close(reference.zca(sigma, 1e-13), expected)
    torch.testing.assert_close(reference.newton(sigma, 1e-13, 25), expected)
    # L = [[√5, 0], [4/√5, 3/√5]]
    root = 5**0.5
    expected = torch.tensor([[[1 / root, 0.0], [-4 / (3 * root), root / 3]]], dtype=torch.float64)
    torch.testing.assert_close(reference.cholesky(sigma, 1e-13), expected)


def test_groups_are_neighbours_and_every_position_is_a_sample() -> None:
    x = torch.arange(2 * 6 * 3 * 2.0).view(2, 6, 3, 2)
    rows = reference.grouped(x, 3)
    assert rows.shape == (2, 3, 12)
    for channel in range(6):
        expected = [x[n, channel, h, w].item() for n in range(2) for h in range(3) for w in range(2)]
        assert rows[channel // 3, channel % 3].tolist() == expected
    assert torch.equal(reference.ungrouped(rows, x.shape), x)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_centered_rows_have_the_exact_mean_and_covariance(case: Case) -> None:
    x = case.input()
    if x.shape[1] > 20:
        x = x[:, :20]
    rows, mean = reference.center(x, x.shape[1])
    exact_mean, exact = loop_covariance(samples_of(x))
    epsilon = torch.finfo(rows.dtype).eps
    scale = np.sqrt(np.diag(exact))
    assert (np.abs(mean.double().numpy() - exact_mean) <= 4 * epsilon * (np.abs(exact_mean) + scale)).all()
    # Each entry is exact relative to its two channels' deviations, however far apart these are; of a constant channel
    # nothing is left.
    found = reference.covariance(rows)[0].numpy()
    assert reference.covariance(rows).dtype == torch.float64
    assert (np.abs(found - exact) <= 64 * epsilon * np.outer(scale, scale) + 1e-30).all()


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(1, 7),
    condition=st.sampled_from([1.0, 10.0, 1e4]),
    eps=st.sampled_from([1e-5, 1e-2, 1.0]),
    seed=st.integers(0, 1000),
)
def test_matrices_are_those_of_slow_numpy(size: int, condition: float, eps: float, seed: int) -> None:
    sigma = spread(size, condition, seed)
    regular = sigma.numpy() + eps * np.eye(size)
    lower = reference.cholesky(sigma[None], eps)[0].numpy()
    np.testing.assert_allclose(lower, cholesky_by_loops(sigma.numpy(), eps), rtol=1e-9, atol=1e-9)
    assert (lower == np.tril(lower)).all()
    symmetric = reference.zca(sigma[None], eps)[0].numpy()
    np.testing.assert_allclose(symmetric, symmetric.T, atol=1e-10)
    np.testing.assert_allclose(symmetric @ symmetric @ regular, np.eye(size), atol=1e-8)
    assert (np.linalg.eigvalsh(symmetric) > 0).all()  # of all square roots the positive one
    for iterations in (0, 1, 5):
        found = reference.newton(sigma[None], eps, iterations)[0].numpy()
        np.testing.assert_allclose(found, newton_by_the_paper(sigma.numpy(), eps, iterations), rtol=1e-9, atol=1e-12)


def test_newton_converges_where_the_printed_iteration_is_carried_off_by_rounding() -> None:
    sigma, eps = spread(8, 1e8), 1e-13
    with np.errstate(all="ignore"):
        printed = newton_by_the_paper(sigma.numpy(), eps, 80)
    assert not np.isfinite(printed).all() or np.abs(printed @ printed @ sigma.numpy() - np.eye(8)).max() > 1e-2
    found = reference.newton(sigma[None], eps, 80)
    torch.testing.assert_close(found, reference.zca(sigma[None], eps), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("share", [0.5, 0.01, 1e-4])
@pytest.mark.parametrize("iterations", [0, 2, 5])
def test_newton_leaves_directions_with_a_small_share_of_the_trace_small(share: float, iterations: int) -> None:
    sigma = torch.diag(torch.tensor([1 - share, share], dtype=torch.float64))
    matrix = reference.newton(sigma[None], 1e-13, iterations)[0]
    left = float((matrix @ sigma @ matrix.mT)[1, 1])
    bound = 1.5 ** (2 * iterations) * share  # what the documentation promises
    assert left <= 1 + 1e-9
    assert left <= bound * (1 + 1e-9)
    if bound < 0.1:
        assert left >= bound / 2


@pytest.mark.parametrize("method", reference.METHODS)
def test_a_singular_covariance_beside_which_eps_is_lost(method: str) -> None:
    x = correlated(30, 4).float() * 1e15
    x[:, 2] = x[:, 1]
    x[:, 3] = 7
    rows, _ = reference.center(x, 4)
    matrix = reference.projection(reference.covariance(rows), 1e-5, method)
    assert matrix.isfinite().all()
    assert (reference.apply_projection(rows, matrix).square().mean(-1) < 1.5).all()


def test_coloring_and_scaling_multiply_the_output() -> None:
    rows, _ = reference.center(correlated(20, 6), 3)
    matrix = reference.zca(reference.covariance(rows), 1e-5)
    y = reference.apply_projection(rows, matrix)
    weight, bias = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    scaled = reference.apply_projection(rows, reference.color(matrix, weight), bias)
    torch.testing.assert_close(scaled, y * weight.view(2, 3, 1) + bias.view(2, 3, 1))
    coloring = torch.randn(2, 3, 3, dtype=torch.float64)
    colored = reference.apply_projection(rows, reference.color(matrix, coloring), bias)
    expected = torch.stack([coloring[g] @ y[g] + bias.view(2, 3, 1)[g] for g in range(2)])
    torch.testing.assert_close(colored, expected)
