"""Shifts of statistics by dropout: measured ones against numpy, expected ones against simulated training."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.lab.measures import variance_shifts
from batchlab.lab.networks import build
from batchlab.lab.settings import DropoutSettings, NetworkSettings
from batchlab.lab.shifts import expected_shifts, mean_shifts
from batchlab.nn import BatchNorm1d, BatchwiseDropout


def network(kind: str, place: str = "hidden", norm: str = "batch_norm", channels: tuple[int, ...] = ()) -> Any:
    torch.manual_seed(1)
    dropout = DropoutSettings(kind, 0.0, 0.5, position=place)
    return build((8, 8), 4, NetworkSettings((40, 30), "relu", norm, 0.3, dropout, channels=channels))


def images(count: int = 2500) -> torch.Tensor:
    # Pixels with means of their own, and correlated: what the formula has c and rho for.
    generator = torch.Generator().manual_seed(2)
    own, shared = (torch.randn(count, width, generator=generator) for width in (64, 5))
    mixed = own + shared @ torch.randn(5, 64, generator=generator) + torch.linspace(-2, 3, 64)
    return mixed.unflatten(1, (8, 8))


def test_mean_shift_is_the_distance_in_deviations() -> None:
    found = network("none")
    found.eval()
    first: Any = found.normalization1
    first.running_mean.copy_(torch.randn(40))
    entering = found.linear1(images().flatten(1)).detach().double().numpy()
    distance = np.abs(first.running_mean.double().numpy() - entering.mean(0))
    expected = (distance / np.sqrt(entering.var(0, ddof=1) + first.eps)).mean()
    assert mean_shifts(found, images())["normalization1"] == pytest.approx(expected, rel=1e-4)
    assert set(mean_shifts(found, images())) == {"normalization1", "normalization2"}


@pytest.mark.parametrize("p", [0.2, 0.5])
@pytest.mark.parametrize("kind", [nn.Dropout, BatchwiseDropout])
@pytest.mark.parametrize("direct", [True, False], ids=["in front", "linear between"])
def test_theory_expects_what_training_leaves(kind: Any, p: float, direct: bool) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(64, 20, bias=False)
    parts = [linear, kind(p)] if direct else [kind(p), linear]
    model = nn.Sequential(nn.Flatten(), *parts, BatchNorm1d(20, momentum=None))
    x = images(4000)
    for _ in range(40):
        for part in x[torch.randperm(4000)].split(200):
            model(part)
    expected, measured = expected_shifts(model, x)["3"], variance_shifts(model, x)["3"]
    assert expected == pytest.approx(measured, rel=0.04)
    assert expected > 1.05


def test_without_dropout_in_front_nothing_is_expected() -> None:
    ones = {"normalization1": 1.0, "normalization2": 1.0}
    assert expected_shifts(network("none"), images()) == ones
    assert expected_shifts(network("independent", "last"), images()) == ones
    assert expected_shifts(network("none", norm="none"), images()) == {}
    hidden = expected_shifts(network("independent"), images())
    assert hidden["normalization1"] == 1.0
    assert hidden["normalization2"] > 1.1


def test_what_lies_behind_other_layers_is_left_out() -> None:
    assert set(expected_shifts(network("independent", channels=(3, 4)), images())) == {
        "normalization1",
        "normalization4",
    }
    between = nn.Sequential(
        OrderedDict(drop=nn.Dropout(0.5), linear=nn.Linear(64, 9), act=nn.ReLU(), norm=BatchNorm1d(9))
    )
    assert expected_shifts(between, torch.randn(50, 64)) == {}


def test_dead_units_and_zero_weights_expect_no_shift() -> None:
    model = nn.Sequential(nn.Dropout(0.5), BatchNorm1d(3))
    assert expected_shifts(model, torch.zeros(50, 3)) == {"1": 1.0}
