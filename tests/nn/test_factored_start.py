"""`initialize`: gains and biases from a batch (Salimans & Kingma 2016, section 3)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchlab.nn as ours
from batchlab.reference.factored import FACTORIZATIONS

PER_UNIT = [name for name in FACTORIZATIONS if name != "spectral_norm"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def moments_of(y: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    rows = y.detach().double().movedim(dim, 0).flatten(1)
    return rows.mean(1), rows.std(1, correction=0)


CASES: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "Linear": (lambda f: ours.FactoredLinear(6, 4, factorization=f), (50, 6), 1),
    "Linear on sequences": (lambda f: ours.FactoredLinear(6, 4, factorization=f), (5, 9, 6), 2),
    "Conv1d": (lambda f: ours.FactoredConv1d(6, 4, 3, groups=2, factorization=f), (5, 6, 9), 1),
    "Conv2d": (lambda f: ours.FactoredConv2d(2, 4, 3, padding=1, factorization=f), (5, 2, 6, 5), 1),
    "Conv2d, one image": (lambda f: ours.FactoredConv2d(2, 4, 3, factorization=f), (2, 9, 9), 0),
    "Conv3d": (lambda f: ours.FactoredConv3d(2, 3, 2, factorization=f), (2, 2, 4, 4, 4), 1),
}


@pytest.mark.parametrize("factorization", PER_UNIT)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_outputs_have_mean_zero_and_deviation_one(name: str, factorization: str, mean: float) -> None:
    make, shape, dim = CASES[name]
    layer, x = make(factorization), torch.randn(shape) + mean
    direction, objects = layer.v.detach().clone(), [id(p) for p in layer.parameters()]
    if name == "Conv2d" and mean:
        x = x - mean + 3  # at the zero padding a large mean is no longer a constant
    layer.initialize(x)
    got_mean, got_std = moments_of(copy.deepcopy(layer).double()(x.double()), dim)
    tolerance = 1e-5 * max(mean, 1)  # gain and bias are rounded to float32, the bias is as large as the mean
    torch.testing.assert_close(got_mean, torch.zeros_like(got_mean), rtol=0, atol=tolerance)
    torch.testing.assert_close(got_std, torch.ones_like(got_std), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.v, direction)
    assert [id(p) for p in layer.parameters()] == objects


def test_equals_the_papers_formula() -> None:
    layer, x = ours.FactoredLinear(5, 3), torch.randn(40, 5, dtype=torch.float64) * 2 + 1
    layer.double().initialize(x)
    for unit, direction in enumerate(layer.v.detach()):
        t = [float(row @ direction) / float(direction.norm()) for row in x]
        mean = sum(t) / len(t)
        std = (sum((value - mean) ** 2 for value in t) / len(t)) ** 0.5
        assert layer.g[unit, 0].item() == pytest.approx(1 / std)
        assert layer.bias[unit].item() == pytest.approx(-mean / std)


def test_without_a_bias_the_mean_stays() -> None:
    layer, x = ours.FactoredLinear(5, 3, bias=False), torch.randn(40, 5) + 2
    layer.initialize(x)
    mean, std = moments_of(layer(x), 1)
    torch.testing.assert_close(std, torch.ones_like(std))
    assert (mean.abs() > 1e-2).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer, x = ours.FactoredConv2d(3, 4, 3, dtype=dtype), (torch.randn(8, 3, 9, 9) * 50).to(dtype)
    layer.initialize(x)
    mean, std = moments_of(layer(x), 1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=2e-2)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=2e-2, atol=0)


def unchanged(layer: nn.Module, x: Tensor, match: str) -> None:
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=match):
        layer.initialize(x)  # type: ignore[operator]
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_constant_units_are_named_and_nothing_changes() -> None:
    layer = ours.FactoredLinear(4, 3)
    unchanged(layer, torch.ones(10, 4), r"3 of 3 units .* \(units 0, 1, 2\)")
    unchanged(layer, torch.full((10, 4), float("nan")), "nothing finite")
    with torch.no_grad():
        layer.v[1] = 0
    unchanged(layer, torch.randn(10, 4), r"1 of 3 units .* \(units 1\)")
    with torch.no_grad():
        layer.v[1] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    x = torch.randn(10, 4) * 1e3
    x[:, 2] = 0.1
    unchanged(layer, x, r"units 1\)")
    for few in (x[:1], x[:0], x[0]):
        unchanged(layer, few, "values per unit")
    unchanged(ours.FactoredLinear(4, 3, factorization="spectral_norm"), x, "one gain for all units")
    alike = torch.full((10, 4), 1000.0)
    alike[::2] = alike[::2].nextafter(torch.tensor(1e9))  # rounding is not a deviation
    with torch.no_grad():
        layer.v.fill_(1.0)
    unchanged(layer, alike, "3 of 3 units")
    tiny = ours.FactoredLinear(4, 3, dtype=torch.float16)
    unchanged(tiny, (torch.randn(10, 4) * 3e-6).half(), "too large for torch.float16")
