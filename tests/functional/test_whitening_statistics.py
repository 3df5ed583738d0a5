"""Running statistics of whitening, and what the functions refuse."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchlab.functional import update_whitening_statistics, whiten, whitening_matrix
from batchlab.reference.whitening import zca as reference_zca
from tests.whitening_by_hand import correlated, samples_of, whitened

METHODS = ("zca", "cholesky", "newton")


def fresh(channels: int = 4, size: int = 4) -> tuple[Tensor, Tensor]:
    groups = channels // size
    return torch.zeros(channels), torch.eye(size, dtype=torch.float64).repeat(groups, 1, 1)


@pytest.mark.parametrize("momentum", [0.3, 0.0, 1.0, None])
@pytest.mark.parametrize("update_only", [False, True])
def test_running_statistics_are_those_of_a_loop(momentum: float | None, update_only: bool) -> None:
    mean, sigma = fresh(4, 2)
    count = torch.tensor(0)
    expected_mean, expected = np.zeros(4), [np.eye(2), np.eye(2)]
    for step in range(4):
        x = correlated(5 + step, 4, 3, seed=step, mean=2.0)
        options: dict[str, Any] = {"group_size": 2, "num_batches_tracked": count}
        if update_only:
            update_whitening_statistics(x, mean, sigma, momentum, **options)
        else:
            whiten(x, mean, sigma, None, None, True, momentum, **options)
        rows = samples_of(x)
        weight = 1 / (step + 1) if momentum is None else momentum
        expected_mean += weight * (rows.mean(0) - expected_mean)
        for group in range(2):
            unbiased = np.cov(rows[:, 2 * group : 2 * group + 2].T)
            expected[group] = (1 - weight) * expected[group] + weight * unbiased
    assert count.item() == 4
    np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sigma.numpy(), np.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_after_many_equal_batches_evaluation_is_training(method: str) -> None:
    x = correlated(30, 4, mean=1.0)
    mean, sigma = fresh()
    mean = mean.double()
    for _ in range(400):
        trained = whiten(x, mean, sigma, training=True, method=method, eps=1e-12)
    # but for the unbiased covariance, n/(n-1) times the batch's
    evaluated = whiten(x, mean, sigma, method=method, eps=1e-12)
    torch.testing.assert_close(evaluated, trained * (29 / 30) ** 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_uses_the_given_statistics_sample_by_sample(method: str) -> None:
    history = correlated(50, 4, seed=1)
    mean, sigma = fresh()
    whiten(history, mean, sigma, training=True, momentum=1.0, method=method)
    before = mean.clone(), sigma.clone()
    matrix = whitening_matrix(sigma, method=method)[0]
    x = correlated(7, 4, 3, seed=2)
    y = whiten(x, mean, sigma, method=method)
    for n in range(7):
        torch.testing.assert_close(whiten(x[n : n + 1], mean, sigma, method=method), y[n : n + 1])
        for position in range(3):
            torch.testing.assert_close(y[n, :, position], matrix @ (x[n, :, position] - mean.double()))
    assert torch.equal(mean, before[0])
    assert torch.equal(sigma, before[1])


def test_averaged_covariances_survive_batches_smaller_than_the_group_and_averaged_matrices_do_not() -> None:
    torch.manual_seed(0)
    mean, sigma = fresh(32, 32)
    count, matrices = torch.tensor(0), torch.zeros(32, 32, dtype=torch.float64)
    for _ in range(60):
        x = torch.randn(8, 32)
        whiten(x, mean, sigma, training=True, momentum=None, num_batches_tracked=count)
        matrices += whitening_matrix(torch.cov(x.double().T, correction=0)[None])[0] / 60
    test = torch.randn(1000, 32)
    assert 0.8 < whiten(test, mean, sigma).var().item() < 1.3
    assert (test.double() @ matrices.mT).var().item() > 1e3


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_that_a_bad_batch_spoiled_show(method: str) -> None:
    mean, sigma = fresh(4, 2)
    sigma[0, 1, 1] = float("nan")
    y = whiten(correlated(5, 4), mean, sigma, method=method, group_size=2)
    assert y[:, :2].isnan().all()
    assert y[:, 2:].isfinite().all()


@pytest.mark.parametrize("matrix", [whitening_matrix, reference_zca], ids=["functional", "reference"])
def test_zca_of_a_covariance_that_lost_digits(matrix: Any) -> None:
    # Singular, and rounded to float32 in a file: an eigenvalue of -4e-5, further below 0 than eps is above.
    values = torch.tensor([1e3, -4e-5, 2.0], dtype=torch.float64)
    vectors, _ = torch.linalg.qr(correlated(3, 3))
    found = matrix((vectors * values @ vectors.mT)[None], 1e-5)[0]
    assert found.isfinite().all()
    assert torch.linalg.eigvalsh(found).max().item() == pytest.approx(1e-5**-0.5, rel=1e-4)


def test_empty_batches_pass_and_count_nothing() -> None:
    mean, sigma = fresh()
    count = torch.tensor(0)
    x, weight = torch.zeros(0, 4, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    for method in METHODS:
        for training in (True, False):
            y = whiten(x, mean, sigma, weight, None, training, method=method, num_batches_tracked=count)
            assert y.shape == x.shape
            y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    assert count == 0
    assert not mean.any()
    assert torch.equal(sigma[0], torch.eye(4, dtype=torch.float64))


def test_a_batch_of_two() -> None:
    x = torch.tensor([[1.0, 5.0, 2.0], [3.0, 1.0, 2.0]])
    y = whiten(x, None, None, training=True, eps=1e-9)
    np.testing.assert_allclose(samples_of(y), whitened(x, "zca", 1e-9), atol=1e-6)
    torch.testing.assert_close(y[0], -y[1])
    assert y[0].norm().item() == pytest.approx(1)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    x = correlated(6, 4)
    mean, sigma = fresh()
    before = mean.clone(), sigma.clone()
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, r"group_size is 3.* 4 channels .*nearest that do: 2, 4 ", (x, mean, sigma), {"group_size": 3}),
        (ValueError, r"group_size is 8.*nearest that do: 4 ", (x, mean, sigma), {"group_size": 8}),
        (ValueError, r"group_size is 0.*nearest that do: 1 ", (x, mean, sigma), {"group_size": 0}),
        (ValueError, r"method is 'pca'; allowed are 'zca', 'cholesky'", (x, mean, sigma), {"method": "pca"}),
        (ValueError, "eps is 0", (x, mean, sigma), {"eps": 0}),
        (ValueError, "eps is nan", (x, mean, sigma), {"eps": float("nan")}),
        (ValueError, "iterations is -1", (x, mean, sigma), {"iterations": -1}),
        (ValueError, "iterations is 2.5", (x, mean, sigma), {"iterations": 2.5}),
        (ValueError, "momentum is 2", (x, mean, sigma), {"momentum": 2}),
        (ValueError, "needs num_batches_tracked", (x, mean, sigma), {"momentum": None}),
        (ValueError, "running_covariance is None and the other is not", (x, mean, None), {}),
        (ValueError, "running_mean is None and the other is not", (x, None, sigma), {}),
        (ValueError, r"running_covariance has shape \(4, 4\).* must be \(1, 4, 4\)", (x, mean, sigma[0]), {}),
        (ValueError, r"weight has shape \(3\).*\(4,\) or \(1, 4, 4\)", (x, mean, sigma, torch.ones(3)), {}),
        (ValueError, r"bias has shape \(1\)", (x, mean, sigma, None, torch.ones(1)), {}),
        (ValueError, "one value per channel.*drop_last", (x[:1], mean, sigma), {}),
        (ValueError, r"needs \(N, C, ...\)", (x[0], mean, sigma), {}),
        (TypeError, r"x is torch.int64.*x.float\(\)", (x.long(), mean, sigma), {}),
    ]
    for error, message, arguments, options in cases:
        with pytest.raises(error, match=message):
            whiten(*arguments, training=True, **options)
    with pytest.raises(ValueError, match="training=False whitens with running statistics"):
        whiten(x, None, None)
    with pytest.raises(ValueError, match=r"there are 0 channels"):
        whiten(x[:, :0], None, None, training=True)
    for bad in (sigma[0], sigma[:, :2]):
        with pytest.raises(ValueError, match=r"must be \(groups, size, size\)"):
            whitening_matrix(bad)
    assert torch.equal(mean, before[0])
    assert torch.equal(sigma, before[1])
