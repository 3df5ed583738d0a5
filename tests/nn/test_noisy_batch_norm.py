"""Noise behind batch normalization: its distribution, where it is and where it is not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchlab.nn as ours

SILENT = {"mean_range": 0.0, "std_range": 1.0, "mean_spread": 0.0, "std_spread": 0.0}


def noise(steps: int, shape: tuple[int, ...], seed: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Shifts and scales of each step, (steps, *shape), read off outputs for inputs whose normalization is known."""
    torch.manual_seed(seed)
    layer = ours.NoisyBatchNorm1d(shape[1], eps=0.0, **options).double()
    sign = torch.ones(shape, dtype=torch.float64)
    sign[::2] = -1  # mean 0 and variance 1: normalization leaves it as it is
    shifts, scales = [], []
    for _ in range(steps):
        seeds = torch.get_rng_state()
        plus = layer(sign)
        torch.set_rng_state(seeds)
        minus = layer(-sign)
        shifts.append((plus + minus) / 2)
        scales.append((plus - minus) / (2 * sign))
    return torch.stack(shifts).detach(), torch.stack(scales).detach()


def test_distribution_over_steps_activations_and_samples() -> None:
    shifts, scales = noise(100, (200, 20), seed=0, mean_range=2.0, std_range=3.0, mean_spread=0.3, std_spread=0.2)
    # Per step and activation, over samples: uniform about one mean, normal about another.
    assert float((shifts.amax(1) - shifts.amin(1)).max()) <= 2 * 0.3
    assert shifts.std(1).mean().item() == pytest.approx(0.3 / 3**0.5, rel=0.02)
    assert scales.std(1).mean().item() == pytest.approx(0.2, rel=0.02)
    # The two means are drawn anew for each activation and step.
    mu, sigma = shifts.mean(1), scales.mean(1)
    for values, low, high, slack in ((mu, -2.0, 2.0, 0.1), (sigma, 1.0, 3.0, 0.1)):
        assert values.min() >= low - slack
        assert values.max() <= high + slack
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.08)
        assert values.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.03)
        over_steps, over_activations = values.std(0), values.std(1)
        assert over_steps.min() > 0.5 * over_steps.max()
        assert over_activations.min() > 0.3 * over_activations.max()
    together = torch.corrcoef(torch.stack([mu.flatten(), sigma.flatten()]))[0, 1]
    assert abs(together.item()) < 0.08


def test_each_position_of_a_feature_map_has_a_shift_of_its_own() -> None:
    shifts, _ = noise(1, (50, 3, 8), seed=1, mean_range=1.0, mean_spread=0.0)
    assert torch.allclose(shifts[0], shifts[0, :1].expand(50, 3, 8))  # the same for all samples
    assert len(shifts[0, 0].unique()) == 24


def test_without_noise_it_is_batch_norm() -> None:
    mine, plain = ours.NoisyBatchNorm2d(4, **SILENT), ours.BatchNorm2d(4)
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mine(x), plain(x))
    torch.testing.assert_close(mine.running_var, plain.running_var)


def test_noise_is_behind_weight_and_bias_and_out_of_the_statistics() -> None:
    torch.manual_seed(2)
    noisy, plain = ours.NoisyBatchNorm1d(4), nn.BatchNorm1d(4)
    x = torch.randn(64, 4)
    with torch.no_grad():
        for layer in (noisy, plain):
            layer.weight.zero_()
            layer.bias.fill_(5.0)
    shifted = noisy(x)
    assert (shifted - 5).abs().mean() > 0.2  # a scale between 1 and 1.25 of 5, and a shift
    plain(x)
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(noisy.state_dict()[key], plain.state_dict()[key])


def test_the_same_seed_is_the_same_noise_and_gradients_go_through_the_scale() -> None:
    layer = ours.NoisyBatchNorm1d(3).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def function(values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return layer(values)

    assert torch.equal(function(x), function(x))
    assert not torch.equal(layer(x), layer(x))
    layer.update_statistics = False
    assert torch.autograd.gradcheck(function, x)


def test_noise_is_a_matter_of_the_mode_alone() -> None:
    layer = ours.NoisyBatchNorm1d(3)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))
    layer.statistics = "running"
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    before = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options", [{"mean_range": -0.1}, {"std_range": 0.9}, {"mean_spread": float("nan")}, {"std_spread": float("inf")}]
)
def test_bad_widths_are_refused(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is"):
        ours.NoisyBatchNorm1d(3, **options)
