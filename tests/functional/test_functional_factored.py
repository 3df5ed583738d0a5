"""Factored weights against loops in float64, torch's parametrizations, and the papers' statements on gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from batchlab.functional import factor_weight, factored_weight
from batchlab.reference import factored as reference

ALL = reference.FACTORIZATIONS
CENTERED = reference.CENTERED
PER_UNIT = [name for name in ALL if name != "spectral_norm"]


def slow(v: Tensor, g: Tensor, factorization: str, eps: float) -> np.ndarray:
    """Python floats, one unit and one number at a time; for spectral_norm numpy's decomposition."""
    rows = v.detach().double().flatten(1).tolist()
    gains = g.detach().double().flatten().tolist()
    if factorization == "spectral_norm":
        sigma = np.linalg.svd(np.array(rows), compute_uv=False)[0]
        return np.array(rows) * gains[0] / max(sigma, eps)
    result = []
    for row, gain in zip(rows, gains, strict=True):
        mean = math.fsum(row) / len(row) if factorization in CENTERED else 0.0
        deviations = [value - mean for value in row]
        squares = math.fsum(value * value for value in deviations)
        if factorization == "weight_standardization":
            divisor = math.sqrt(squares / max(len(row) - 1, 1)) + eps
        else:
            divisor = max(math.sqrt(squares), eps)
        result.append([gain * value / divisor for value in deviations])
    return np.array(result)


def factors(shape: tuple[int, ...], factorization: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    v = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    g = torch.randn(reference.gain_shape(v, factorization), generator=generator, dtype=torch.float64).to(dtype)
    return v, g


def vectors(v: Tensor, factorization: str) -> dict[str, Tensor]:
    if factorization != "spectral_norm":
        return {}
    left, right = reference.leading_singular_vectors(v)
    return {"left": left, "right": right}


@pytest.mark.parametrize("factorization", ALL)
@pytest.mark.parametrize("shape", [(4, 7), (1, 5), (5, 1), (1, 1), (6, 2, 3), (3, 4, 3, 3), (2, 3, 1, 2, 3), (7, 300)])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_equals_loops(factorization: str, shape: tuple[int, ...], mean: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        v, g = factors(shape, factorization, dtype)
        v = v + mean
        w = factored_weight(v, g, factorization, **vectors(v, factorization))
        assert w.dtype == dtype
        expected = slow(v, g, factorization, 1e-5)
        scale = max(float(np.abs(expected).max()), 1e-30)
        assert np.abs(w.double().numpy().reshape(expected.shape) - expected).max() <= tolerance * scale


@pytest.mark.parametrize("factorization", PER_UNIT)
def test_half_precision_lengths_are_accumulated_in_float32(factorization: str) -> None:
    v = (torch.randn(3, 400) * 4000).half()  # the sum of squares is beyond float16
    g = torch.tensor([[1.0], [-2.0], [0.5]]).half()
    w = factored_weight(v, g, factorization)
    expected = slow(v, g, factorization, 1e-5)
    assert w.dtype == torch.float16
    np.testing.assert_allclose(w.double().numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        factor_weight(torch.full((1, 400), 6e4).half())


@pytest.mark.parametrize("factorization", ALL)
def test_gradients_of_first_and_second_order(factorization: str) -> None:
    v, g = (x.requires_grad_() for x in factors((3, 2, 3), factorization))
    constant = vectors(v, factorization)

    def weight(v: Tensor, g: Tensor) -> Tensor:
        return factored_weight(v, g, factorization, **constant)

    assert torch.autograd.gradcheck(weight, (v, g))
    assert torch.autograd.gradgradcheck(weight, (v, g))


@pytest.mark.parametrize("shape", [(5, 4), (4, 3, 3, 3)])
def test_weight_norm_equals_torch(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(4, 5) if len(shape) == 2 else nn.Conv2d(3, 4, 3)
    parametrizations.weight_norm(layer)
    theirs = layer.parametrizations.weight  # type: ignore[union-attr]
    with torch.no_grad():
        theirs.original0.mul_(-1.7)  # type: ignore[union-attr, operator]
    g, v = (x.detach().clone().requires_grad_() for x in (theirs.original0, theirs.original1))  # type: ignore[union-attr]
    weight, upstream = factored_weight(v, g), torch.randn(shape)
    torch.testing.assert_close(weight, layer.weight)
    (weight * upstream).sum().backward()
    (layer.weight * upstream).sum().backward()  # type: ignore[operator]
    torch.testing.assert_close(g.grad, theirs.original0.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(v.grad, theirs.original1.grad)  # type: ignore[union-attr]


def gradient(v: Tensor, g: Tensor, factorization: str) -> Tensor:
    v = v.detach().requires_grad_()
    weight = factored_weight(v, g, factorization, eps=1e-12, **vectors(v, factorization))
    (weight * torch.linspace(-1, 2, v.numel(), dtype=v.dtype).view_as(v).sin()).sum().backward()
    assert v.grad is not None
    return v.grad


@pytest.mark.parametrize("factorization", PER_UNIT)
def test_gradient_is_orthogonal_to_the_direction_and_its_length_grows(factorization: str) -> None:
    v, g = factors((4, 9), factorization)
    step = gradient(v, g, factorization)
    along = v - v.mean(1, keepdim=True) if factorization in CENTERED else v
    size = (along.norm(dim=1), step.norm(dim=1))
    assert ((along * step).sum(1).abs() < 1e-10 * size[0] * size[1]).all()
    if factorization in CENTERED:
        assert (step.sum(1).abs() < 1e-10 * size[1]).all()
    # Salimans & Kingma, section 2.1: one plain step of gradient descent, c = ‖Δv‖ / ‖v‖.
    c = 0.3 * size[1] / size[0]
    torch.testing.assert_close((along - 0.3 * step).norm(dim=1), (1 + c**2).sqrt() * size[0])


@pytest.mark.parametrize("factorization", ALL)
def test_the_size_of_v_does_not_matter_and_divides_its_gradient(factorization: str) -> None:
    v, g = factors((4, 9), factorization)
    weight = factored_weight(v, g, factorization, eps=1e-12, **vectors(v, factorization))
    for size in (1e-3, 7.0, 1e6):
        scaled = factored_weight(v * size, g, factorization, eps=1e-12, **vectors(v, factorization))
        torch.testing.assert_close(scaled, weight, rtol=1e-8, atol=0)
        torch.testing.assert_close(gradient(v * size, g, factorization) * size, gradient(v, g, factorization))
    if factorization in CENTERED:
        shifted = factored_weight(v + 12.5, g, factorization, eps=1e-12)
        torch.testing.assert_close(shifted, weight)
        torch.testing.assert_close(shifted.sum(1), torch.zeros(4, dtype=v.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("factorization", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_and_constant_units_have_finite_values_and_gradients(factorization: str, dtype: torch.dtype) -> None:
    v = torch.zeros(3, 4, dtype=dtype)
    v[1] = 2.5  # constant: zero once it is centred
    if factorization == "spectral_norm":
        v[1] = 0  # one length for all units
    g = torch.ones(reference.gain_shape(v, factorization), dtype=dtype, requires_grad=True)
    v.requires_grad_()
    start = {"left": torch.ones(3), "right": torch.ones(4)} if factorization == "spectral_norm" else {}
    weight = factored_weight(v, g, factorization, **start)
    assert not weight[0].any()
    first = torch.autograd.grad(weight.square().sum() + weight.sum(), (v, g), create_graph=True)
    assert all(x.isfinite().all() for x in first)
    second = torch.autograd.grad(sum(x.sum() for x in first), (v, g))  # type: ignore[arg-type]
    assert all(x.isfinite().all() for x in second)


def test_a_zero_unit_learns_as_a_plain_weight_does() -> None:
    weight = torch.randn(3, 4)
    weight[1] = 0
    found = factor_weight(weight)
    v, g = found.v.clone().requires_grad_(), found.g.clone().requires_grad_()
    upstream = torch.randn(3, 4)
    (factored_weight(v, g) * upstream).sum().backward()
    assert v.grad is not None
    torch.testing.assert_close(v.grad[1], upstream[1])
    with torch.no_grad():
        v -= 0.1 * v.grad
        g.requires_grad_().grad = None
    (factored_weight(v, g) * upstream).sum().backward()
    assert g.grad is not None
    torch.testing.assert_close(-g.grad[1, 0], upstream[1].norm())  # the gain has its full gradient at once


def test_a_fan_in_of_one_has_no_deviation() -> None:
    v, g = torch.randn(3, 1, requires_grad=True), torch.ones(3, 1)
    for factorization in CENTERED:
        weight = factored_weight(v, g, factorization)
        assert not weight.any()
        (grad,) = torch.autograd.grad(weight.sum(), v)
        assert not grad.any()
    torch.testing.assert_close(factored_weight(v, g), v.sign())
    assert factored_weight(torch.empty(3, 0), g).shape == (3, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ALL),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**20),
    st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_taken_apart_and_put_together(factorization: str, dtype: torch.dtype, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randint(1, 6, (int(torch.randint(2, 5, (), generator=generator)),), generator=generator).tolist()
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) * size
    weight = reference.direction(weight, factorization).to(dtype)
    weight[0] = 0
    found = factor_weight(weight, factorization)
    assert found.v is weight
    again = factored_weight(found.v, found.g, factorization, left=found.left, right=found.right)
    bitwise = dtype in (torch.float32, torch.float64) and factorization not in CENTERED
    allowed = 0.0 if bitwise else 2 * torch.finfo(dtype).eps * float(weight.abs().max())
    assert float((again.double() - weight.double()).abs().max()) <= allowed


def test_spectral_norm_by_power_iteration_finds_the_largest_singular_value() -> None:
    v = torch.randn(6, 4, 3, dtype=torch.float64)
    left, right = torch.randn(6, dtype=v.dtype), torch.randn(12, dtype=v.dtype)
    left, right = reference.power_iteration(v, left, right, eps=1e-5, steps=300)
    sigma = reference.length(v, "spectral_norm", 1e-5, left, right)
    expected = torch.linalg.matrix_norm(v.flatten(1), 2)
    torch.testing.assert_close(sigma.flatten()[0], expected)
    torch.testing.assert_close(
        reference.length(v, "spectral_norm", 1e-5, *reference.leading_singular_vectors(v)), sigma
    )
    zero = reference.power_iteration(torch.zeros_like(v), left, right, eps=1e-5)
    assert torch.equal(zero[0], left)  # and not zeros, from which no iteration comes back
    assert torch.equal(zero[1], right)


def test_means_are_refused_unless_they_are_to_be_dropped() -> None:
    weight = torch.tensor([[1.0, -1.0], [3.0, 1.0], [2.0, 2.0]])
    for factorization in CENTERED:
        with pytest.raises(ValueError, match=r"2 of 3 units have one \(units 1, 2\): up to 1 of a unit's norm"):
            factor_weight(weight, factorization)
        found = factor_weight(weight, factorization, project=True)
        again = factored_weight(found.v, found.g, factorization)
        torch.testing.assert_close(again, torch.tensor([[1.0, -1.0], [1.0, -1.0], [0.0, 0.0]]))


def test_wrong_arguments() -> None:
    v, g = torch.randn(3, 4), torch.ones(3, 1)
    with pytest.raises(ValueError, match="factorization is 'wn'; allowed are 'weight_norm', 'centered_weight_norm'"):
        factored_weight(v, g, "wn")
    for eps in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps is"):
            factored_weight(v, g, eps=eps)
    with pytest.raises(ValueError, match=r"g has shape \(3,\); for v of shape \(3, 4\) it must be \(3, 1\)"):
        factored_weight(v, g.flatten())
    with pytest.raises(ValueError, match=r"must be \(1, 1\)"):
        factored_weight(v, g, "spectral_norm")
    with pytest.raises(ValueError, match="needs left and right"):
        factored_weight(v, g[:1], "spectral_norm")
    with pytest.raises(ValueError, match=r"left has shape \(4,\) and right \(3,\)"):
        factored_weight(v, g[:1], "spectral_norm", left=torch.ones(4), right=torch.ones(3))
    with pytest.raises(ValueError, match=r"v has shape \(4,\)"):
        factored_weight(v[0], g)
    with pytest.raises(TypeError, match=r"v is torch\.int64"):
        factored_weight(v.long(), g)
    with pytest.raises(TypeError, match=r"g is torch\.int64"):
        factored_weight(v, g.long())
    with pytest.raises(TypeError, match=r"weight is torch\.complex64"):
        factor_weight(v.to(torch.complex64))
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match="inf or NaN"):
            factor_weight(torch.tensor([[1.0, bad]]))


def test_autocast_does_not_round_the_length() -> None:
    v, g = torch.randn(8, 30), torch.ones(1, 1)
    constant = vectors(v, "spectral_norm")
    expected = factored_weight(v, g, "spectral_norm", **constant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(factored_weight(v, g, "spectral_norm", **constant), expected)
