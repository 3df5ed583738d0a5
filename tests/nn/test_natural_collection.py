"""What a natural layer collects of its inputs: pooled exactly, and only what is fit to be."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchlab.nn import NaturalLinear
from tests.whitening_by_hand import correlated, loop_covariance


def inputs(rows: int = 40, seed: int = 0, mean: float = 3.0) -> Tensor:
    return correlated(rows, 5, seed=seed, mean=mean)


def make(dtype: torch.dtype = torch.float64, **options: Any) -> NaturalLinear:
    return NaturalLinear(5, 3, dtype=dtype, **options)


def test_batches_pool_exactly_whatever_their_sizes() -> None:
    x = inputs(37, mean=1e3)
    whole, parts = make(), make()
    whole(x)
    for part in x.view(37, 1, 5).split([1, 20, 2, 14]):  # and any leading dimensions
        parts(part)
    parts(x[:0])
    parts.eval()(x)
    parts.train().update_statistics = False
    parts(x)
    mean, sigma = loop_covariance(x.numpy())
    for layer in (whole, parts):
        assert layer.collected_count == 37
        np.testing.assert_allclose(layer.collected_mean.numpy(), mean, rtol=1e-14)
        np.testing.assert_allclose(layer.collected_m2.numpy() / 37, sigma, rtol=1e-9, atol=1e-11)


def test_float32_inputs_with_a_large_mean_lose_nothing_in_the_collection() -> None:
    x = inputs(50, mean=1e4).float()
    layer = make(dtype=torch.float32)
    layer(x)
    _, sigma = loop_covariance(x.double().numpy())
    np.testing.assert_allclose(layer.collected_m2.numpy() / 50, sigma, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [1.0, 0.25, None])
def test_momentum_is_the_weight_of_the_new_collection(momentum: float | None) -> None:
    layer = make(momentum=momentum, eps=1e-9)
    batches = [inputs(20, seed=seed, mean=seed) for seed in range(3)]
    for x in batches:
        layer(x)
        layer.refresh()
    kept = 1.0 if momentum is None else 1 - momentum
    weights = np.repeat([kept**2, kept, 1.0], 20)
    rows = torch.cat(batches).numpy()
    np.testing.assert_allclose(layer.center.numpy(), np.average(rows, axis=0, weights=weights), rtol=1e-12)
    sigma = np.cov(rows.T, aweights=weights, ddof=0)
    u = layer.whitening.numpy()
    np.testing.assert_allclose(u @ sigma @ u.T, np.eye(5), atol=1e-6)


def test_what_is_not_finite_is_not_collected_and_too_little_changes_nothing() -> None:
    layer = make()
    bad = inputs()
    bad[3, 1] = math.inf
    layer(bad)
    layer(torch.full_like(bad, math.nan))
    assert layer.collected_count == 0
    assert not layer.refresh()
    layer(inputs()[:1])
    state = copy.deepcopy(layer.state_dict())
    assert not layer.refresh()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    layer(inputs()[1:2])
    assert layer.refresh()


@pytest.mark.parametrize("x", [torch.zeros(4, 1), torch.zeros(4, 6), torch.zeros(()), torch.zeros(4, 5).half()])
def test_an_input_that_does_not_fit_is_not_collected(x: Tensor) -> None:
    layer = make(dtype=torch.float32)
    with pytest.raises((ValueError, RuntimeError), match=r"last dimension must be in_features=5|dtype"):
        layer(x)
    assert layer.collected_count == 0
