"""Gradients of whitening: any eigenvalues, any order, against divided differences and finite ones."""

import numpy as np
import pytest
import torch
from torch import Tensor

from batchlab.functional import whiten, whitening_matrix
from batchlab.functional.whitening_gradient import covariance, inverse_square_root
from batchlab.reference import whitening as reference
from tests.whitening_by_hand import correlated

METHODS = ("zca", "cholesky", "newton")


def whiten_batch(x: Tensor, method: str = "zca", **options: object) -> Tensor:
    return whiten(x, None, None, training=True, method=method, **options)  # type: ignore[arg-type]


def awkward(name: str) -> tuple[Tensor, float]:
    """A small input and an eps that finite differences can see through."""
    x = correlated(9, 4, seed=3)
    if name == "repeated channel":
        x[:, 2] = x[:, 0]
    if name == "constant channel":
        x[:, 1] = 2.0
    if name == "repeated and constant":
        x[:, 3], x[:, 1] = x[:, 0], -1.0
    if name == "fewer samples than channels":
        x = x[:3]
    if name == "equal eigenvalues":  # an orthogonal design: the covariance is exactly a multiple of the identity
        x = torch.cat([torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64)])
    return x.requires_grad_(), 0.05


NAMES = [
    "plain",
    "repeated channel",
    "constant channel",
    "repeated and constant",
    "fewer samples than channels",
    "equal eigenvalues",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_gradgradcheck(name: str, method: str) -> None:
    x, eps = awkward(name)
    assert torch.autograd.gradcheck(lambda x: whiten_batch(x, method, eps=eps), x)
    assert torch.autograd.gradgradcheck(lambda x: whiten_batch(x, method, eps=eps), x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("coloring", [False, True])
def test_gradcheck_of_maps_in_groups_with_parameters(method: str, coloring: bool) -> None:
    torch.manual_seed(0)
    x = correlated(3, 4, 2, 2).requires_grad_()
    shape = (2, 2, 2) if coloring else (4,)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    running = torch.randn(4, dtype=torch.float64), torch.eye(2, dtype=torch.float64).expand(2, 2, 2) * 2

    def train(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return whiten(x, None, None, weight, bias, True, eps=1e-2, method=method, group_size=2)

    def evaluate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return whiten(x, *running, weight, bias, method=method, group_size=2)

    for function in (train, evaluate):
        assert torch.autograd.gradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("eigenvalues", [[1.0, 2.0, 5.0], [2.0, 2.0, 2.0], [1e-5, 1e-5, 1e4], [1e-12, 1.0, 1.0]])
def test_gradient_is_the_one_of_divided_differences(eigenvalues: list[float]) -> None:
    torch.manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    sigma = ((vectors * values) @ vectors.mT)[None].requires_grad_()
    gradient = torch.randn(1, 3, 3, dtype=torch.float64)
    inverse_square_root(sigma, torch.zeros(1, 1, 1, dtype=torch.float64)).backward(gradient)
    assert sigma.grad is not None
    # Daleckii & Krein: entry by entry in the eigenbasis, f[a, b] = -1 / (√a √b (√a + √b)).
    u = vectors.numpy()
    rotated = u.T @ gradient[0].numpy() @ u
    for i, a in enumerate(eigenvalues):
        for j, b in enumerate(eigenvalues):
            rotated[i, j] *= -1 / (np.sqrt(a) * np.sqrt(b) * (np.sqrt(a) + np.sqrt(b)))
    expected = u @ rotated @ u.T
    np.testing.assert_allclose(sigma.grad[0].numpy(), expected, atol=1e-3 * np.abs(expected).max(), rtol=0)
    # Compared in the eigenbasis, each entry to its own size where eigenvalues are not lost beside each other.
    if min(eigenvalues) > 1e-3:
        np.testing.assert_allclose(sigma.grad[0].numpy(), expected, rtol=1e-10, atol=1e-12)


def test_autograd_through_the_decomposition_agrees_where_it_exists_and_fails_where_not() -> None:
    x = correlated(40, 4).requires_grad_()
    rows, _ = reference.center(x, 4)
    plain = reference.apply_projection(rows, reference.zca(reference.covariance(rows), 1e-5))
    gradient = torch.randn(1, 4, 40, dtype=torch.float64)
    (expected,) = torch.autograd.grad(plain, x, gradient)
    (found,) = torch.autograd.grad(whiten_batch(x), x, gradient[0].T)
    torch.testing.assert_close(found, expected)
    equal = torch.eye(3, dtype=torch.float64)[None].requires_grad_()
    (broken,) = torch.autograd.grad(reference.zca(equal, 1e-5)[0, 0, 1], equal)
    (right,) = torch.autograd.grad(whitening_matrix(equal)[0, 0, 1], equal)
    assert not broken.isfinite().all()
    assert right.isfinite().all()


def test_third_order() -> None:
    base = torch.tensor([[2.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
    direction = torch.tensor([[1.0, -0.5], [-0.5, 0.25]], dtype=torch.float64)

    def along(t: Tensor) -> Tensor:
        return whitening_matrix((base + t * direction)[None])[0, 0, 1] * 3

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value, derivatives = along(t), []
    for _ in range(3):
        (value,) = torch.autograd.grad(value, t, create_graph=True)
        derivatives.append(value.item())
    step = 1e-2
    points = [float(along(torch.tensor(k * step, dtype=torch.float64))) for k in range(-3, 4)]
    third = (points[0] - 8 * points[1] + 13 * points[2] - 13 * points[4] + 8 * points[5] - points[6]) / (8 * step**3)
    assert derivatives[2] == pytest.approx(third, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_functional_transforms_see_through(method: str) -> None:
    x = correlated(6, 3)
    expected = torch.autograd.functional.jacobian(lambda x: whiten_batch(x, method), x)
    torch.testing.assert_close(torch.func.jacrev(lambda x: whiten_batch(x, method))(x), expected)
    batches = torch.stack([x, correlated(6, 3, seed=1)])
    mapped = torch.func.vmap(lambda x: whiten_batch(x, method))(batches)
    torch.testing.assert_close(mapped, torch.stack([whiten_batch(one, method) for one in batches]))


def test_covariance_has_autograds_gradients_and_keeps_no_float64_copy() -> None:
    x = correlated(1, 3, 50)[0].float().requires_grad_()[None]
    gradient = torch.randn(1, 3, 3, dtype=torch.float64)
    found = torch.autograd.grad(covariance(x), x, gradient)[0]
    torch.testing.assert_close(found, torch.autograd.grad(reference.covariance(x), x, gradient)[0])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        covariance(x)
    assert [t.dtype for t in kept] == [torch.float32]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_an_output_that_does_not_vary_with_the_input_are_zero(method: str) -> None:
    # Σ y yᵀ is the identity (exactly so for eps -> 0), so its weighted sum has no gradient; nor has the mean.
    torch.manual_seed(0)
    x = correlated(50, 4).requires_grad_()
    y = whiten_batch(x, method, eps=1e-13, iterations=40)
    weights = torch.randn(4, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y.T @ y * weights).sum() + y.sum(), x)
    assert gradient.abs().max() < 1e-6
