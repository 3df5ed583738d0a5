"""Whitening as a function: what the output is, what it does not depend on, and awkward inputs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from batchlab.functional import whiten
from tests.cases import CASE_IDS, CASES, Case
from tests.whitening_by_hand import correlated, samples_of, whitened

METHODS = ("zca", "cholesky", "newton")
EXACT = ("zca", "cholesky")


def whiten_batch(x: Tensor, method: str = "zca", group_size: int | None = None, eps: float = 1e-5) -> Tensor:
    return whiten(x, None, None, training=True, eps=eps, method=method, group_size=group_size)


def bounded_condition(x: Tensor, eps: float) -> float:
    """Root of the largest over the smallest eigenvalue of the regularized covariance."""
    rows = samples_of(x)
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2 / len(rows)
    return math.sqrt(
        (values.max() + eps) / eps if len(values) < x.shape[1] else 1 + values.max() / (values.min() + eps)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(200, 6), (40, 6, 9), (9, 6, 5, 7), (3, 6, 4, 3, 5)])
@pytest.mark.parametrize("group_size", [None, 3, 2, 1])
def test_output_is_that_of_slow_numpy(method: str, shape: tuple[int, ...], group_size: int | None) -> None:
    x = correlated(*shape, mean=3.0)
    found = samples_of(whiten_batch(x, method, group_size, 1e-3))
    np.testing.assert_allclose(found, whitened(x, method, 1e-3, group_size), atol=1e-9)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_output_has_the_identity_for_its_covariance(method: str, mean: float) -> None:
    x = correlated(16, 8, 10, 10, mean=mean).float()
    y = samples_of(whiten_batch(x, method, 4))
    for start in (0, 4):
        part = y[:, start : start + 4]
        np.testing.assert_allclose(part.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(np.cov(part.T, ddof=0), np.eye(4), atol=2e-3)
    assert np.abs(np.cov(y.T, ddof=0)[:4, 4:]).max() > 0.05  # between groups nothing is promised


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_awkward_inputs_within_float_rounding_of_float64(case: Case, method: str) -> None:
    x = case.input()[:, :20].requires_grad_()
    y = whiten_batch(x, method, eps=case.eps)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert y.dtype == x.dtype
    rows = samples_of(y)
    if x.detach().double().abs().max() > 1e12:  # eps is below rounding: bounded is all there is
        assert (rows.var(0) < 1.01).all()
        return
    exact = whitened(x, method, case.eps)
    tolerance = 8 * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps * bounded_condition(x, case.eps)
    tolerance = max(tolerance, 1e-9) * np.abs(exact).max() + torch.finfo(x.dtype).eps * np.abs(exact).max()
    np.testing.assert_allclose(rows, exact, atol=tolerance, rtol=0)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 6))
def test_zca_is_the_whitening_closest_to_the_input(seed: int, channels: int) -> None:
    x = correlated(50, channels, seed=seed)
    x = x - x.mean(0)
    y = whiten_batch(x, eps=1e-12)
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, generator=generator))
    assert (x - y).square().sum() <= (x - y @ rotation).square().sum() + 1e-9
    assert (x - y).square().sum() <= (x - whiten_batch(x, "cholesky", eps=1e-12)).square().sum() + 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(12, 4), (3, 4, 5, 5)])
def test_groups_of_one_are_batch_normalization(method: str, shape: tuple[int, ...]) -> None:
    inputs = [correlated(*shape, mean=2.0).requires_grad_() for _ in range(2)]
    weight, bias = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    running = mean.clone(), torch.ones(4, 1, 1, dtype=torch.float64)
    theirs = F.batch_norm(inputs[0], mean, var, weight, bias, True)
    ours = whiten(inputs[1], *running, weight, bias, True, method=method, group_size=1)
    gradient = torch.randn(shape, dtype=torch.float64)
    theirs.backward(gradient)
    ours.backward(gradient)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(running[0], mean)
    torch.testing.assert_close(running[1].flatten(), var)
    evaluated = whiten(inputs[1], *running, weight, bias, method=method, group_size=1)
    torch.testing.assert_close(evaluated, F.batch_norm(inputs[0], mean, var, weight, bias))


def invertible(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random matrix with singular values from 0.5 to 2, and a random orthogonal one."""
    bases = [torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0] for _ in range(2)]
    return bases[0] * torch.linspace(0.5, 2, size, dtype=torch.float64) @ bases[1], bases[0]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), method=st.sampled_from(METHODS))
def test_what_each_method_does_not_depend_on(seed: int, method: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 4, dtype=torch.float64, generator=generator) @ invertible(4, generator)[0]
    y = whiten_batch(x, method, eps=1e-13)
    shift = torch.randn(4, dtype=torch.float64, generator=generator) * 10
    order = torch.randperm(60, generator=generator)
    close = {"atol": 1e-8, "rtol": 1e-8}
    torch.testing.assert_close(whiten_batch(x[order] * 3 + shift, method, eps=1e-13), y[order], **close)
    mix, rotation = invertible(4, generator)
    if method == "cholesky":  # x -> A x + b with A lower triangular and positive on its diagonal
        lower = mix.tril(-1) + torch.diag(mix.diagonal().abs() + 0.5)
        torch.testing.assert_close(whiten_batch(x @ lower.mT + shift, method, eps=1e-13), y, **close)
        return
    # zca and newton turn with their input
    torch.testing.assert_close(whiten_batch(x @ rotation, method, eps=1e-13), y @ rotation, **close)
    if method == "zca":  # any invertible A: the result is a rotation of the former
        moved = whiten_batch(x @ mix + shift, method, eps=1e-13)
        turn = y.mT @ moved / 60
        torch.testing.assert_close(turn @ turn.mT, torch.eye(4, dtype=torch.float64), **close)
        torch.testing.assert_close(y @ turn, moved, **close)


@pytest.mark.parametrize("method", METHODS)
def test_positions_are_samples_and_groups_are_apart(method: str) -> None:
    x = correlated(4, 6, 3, 5)
    y = whiten_batch(x, method, 2)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 6)
    torch.testing.assert_close(whiten_batch(rows, method, 2), y.permute(0, 2, 3, 1).reshape(-1, 6))
    parts = [whiten_batch(part, method) for part in x.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), y)


def test_newton_goes_to_zca() -> None:
    x = correlated(100, 8)
    exact = whiten_batch(x)
    errors = [
        (whiten(x, None, None, training=True, method="newton", iterations=n) - exact).abs().max().item()
        for n in (1, 5, 10, 30)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_directions_without_variance_come_out_as_zero_with_bounded_gradients(method: str) -> None:
    x = correlated(64, 5).float()
    x[:, 2] = x[:, 1]
    x[:, 4] = 1e3
    x.requires_grad_()
    y = whiten_batch(x, method)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    y.backward(gradient)
    assert x.grad is not None
    assert (y[:, 4] == 0).all()
    if method == "cholesky":  # nothing is left of a channel that repeats one before it
        assert y[:, 2].abs().max() < 0.02
    else:  # the two share one direction of variance 1
        torch.testing.assert_close(y[:, 1], y[:, 2], atol=1e-4, rtol=1e-4)
        if method == "zca":
            assert y[:, 1].square().mean().item() == pytest.approx(0.5, rel=1e-3)
    assert x.grad.norm() <= 2 / math.sqrt(1e-5) * gradient.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e3, 1.0), (1e6, 1e3)])
def test_fewer_samples_than_channels(method: str, mean: float, std: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 64) * std + mean).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, exact = whiten_batch(x, method), whiten_batch(wide, method)
    gradient = torch.randn(8, 64)
    y.backward(gradient)
    exact.backward(gradient.double())
    assert x.grad is not None
    assert wide.grad is not None
    rank_seven = samples_of(y)
    if method != "newton":
        values = np.linalg.svd(rank_seven, compute_uv=False) ** 2 / 8
        np.testing.assert_allclose(values[:7], 1, atol=1e-4)
        np.testing.assert_allclose(values[7:], 0, atol=1e-9)
        np.testing.assert_allclose(rank_seven, whitened(x, method, 1e-5), atol=2e-6)
    torch.testing.assert_close(y.double(), exact, atol=1e-6, rtol=1e-6)
    # float64 throughout: its terms are 1/√eps and more times the gradient that is left of them
    assert (x.grad - wide.grad).abs().max() <= 1e-6 * wide.grad.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_memory_formats(method: str) -> None:
    x = correlated(4, 6, 5, 7).float()
    expected = whiten_batch(x, method, 3)
    assert expected.is_contiguous()
    last = whiten_batch(x.contiguous(memory_format=torch.channels_last), method, 3)
    assert last.is_contiguous(memory_format=torch.channels_last)
    strided = x.flip(0).repeat_interleave(2, dim=3)[..., ::2].flip(0)
    for other in (last, whiten_batch(strided, method, 3)):
        torch.testing.assert_close(other, expected)
    volume = correlated(2, 6, 3, 4, 5).float().contiguous(memory_format=torch.channels_last_3d)
    assert whiten_batch(volume, method).is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(whiten_batch(volume, method), whiten_batch(volume.contiguous(), method))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_input_has_wide_statistics(dtype: torch.dtype, method: str) -> None:
    x = correlated(300, 4, mean=5.0).to(dtype)
    running = torch.zeros(4), torch.zeros(1, 4, 4, dtype=torch.float64)
    y = whiten(x, *running, training=True, momentum=1.0, method=method)
    assert y.dtype == dtype
    torch.testing.assert_close(running[1][0], torch.cov(x.double().T), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, whiten_batch(x.float(), method).to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method: str) -> None:
    x = correlated(300, 4).float()
    running = torch.zeros(4), torch.eye(4, dtype=torch.float64)[None]
    outside = whiten_batch(x, method), whiten(x, *running, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = whiten_batch(x, method), whiten(x, *running, method=method)
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_spoils_its_group_and_raises_nothing(method: str, bad: float) -> None:
    x = correlated(10, 4)
    expected = whiten_batch(x, method, 2)
    x[3, 0] = bad
    y = whiten_batch(x, method, 2)
    assert y[:, :2].isnan().all()
    torch.testing.assert_close(y[:, 2:], expected[:, 2:])
