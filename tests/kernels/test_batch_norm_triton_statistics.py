"""Statistics in Triton on inputs that break naive sums, and the cutting of x into tiles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchlab.kernels import batch_norm_triton_plan as tiles
from tests.triton_kernels import DEVICE, B, exact_statistics, innermost, numbers, settled

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow in the interpreter

LAYOUTS = ["planes", "rows"]


def arranged(samples: Tensor, layout: str) -> Tensor:
    """(channels, 12, 5, 9) numbers as (12, channels, 5, 9) with planes or with the channels innermost."""
    x = samples.transpose(0, 1).contiguous()
    return (x if layout == "planes" else innermost(*x.shape)(x.flatten())).to(DEVICE)


def normal(channels: int, mean: float, std: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((channels, 12, 5, 9), generator=generator, dtype=torch.float64) * std + mean


def check(x: Tensor, relative: float = 2e-6) -> None:
    """The mean, with what its rounding lost, to `relative` of a deviation; and the variance."""
    statistics = B.moments(x).cpu().double()
    mean, variance = exact_statistics(x)
    assert torch.all(statistics[1].abs() <= 2**-24 * statistics[0].abs())
    assert torch.all((statistics[0] + statistics[1] - mean).abs() <= relative * variance.sqrt())
    assert torch.all((statistics[2] - variance).abs() <= relative * variance)


@pytest.fixture(params=[128, 2048], ids=["split", "whole"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A tile so small that each channel is split among many programs; and the real one."""
    size: int = request.param
    monkeypatch.setattr(tiles, "TILE", size)
    monkeypatch.setattr(tiles, "RUN", 16 if size == 128 else tiles.RUN)
    return size


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [0.0, 1e4, -1e6])
def test_mean_far_from_zero(mean: float, layout: str, tile: int) -> None:
    check(arranged(normal(3, mean, 1.0).float(), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [1, 45, 90])
def test_pivot_from_an_odd_beginning(first: int, layout: str, tile: int) -> None:
    """The first tile holds zeros, everything else is around 10,000: the pivot is far from the mean."""
    samples = normal(2, 1e4, 1.0).float()
    samples.view(2, -1)[:, :first] = 0
    check(arranged(samples, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pivot_of_another_magnitude(layout: str, tile: int) -> None:
    """One number of a billion in the first tile; the others would be nothing in its rounding."""
    samples = normal(3, 0.0, 1.0).float()
    samples[:, 0, 0, 0] = 1e9
    check(arranged(samples, layout))


@pytest.mark.parametrize("value", [0.0, 0.1, 1.2e8, -1e38, 1e-42])
def test_constant_channel_has_no_variance(value: float, tile: int) -> None:
    """Exactly none, although 540 times 0.1 is no multiple of anything; and beside another channel."""
    for layout in LAYOUTS:
        samples = normal(2, 1.0, 1.0).float()
        samples[0] = value
        mean, lost, variance = B.moments(arranged(samples, layout))[:, 0].tolist()
        assert (mean, lost, variance) == (samples[0, 0, 0, 0].item(), 0.0, 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sorted_and_duplicated(layout: str, tile: int) -> None:
    ordered = normal(1, 5.0, 1.0).flatten().sort().values.view(1, 12, 5, 9).float()
    x = arranged(torch.cat([ordered, ordered, ordered.flip(1)]), layout)
    check(x)
    statistics = B.moments(x)
    assert torch.equal(statistics[:, 0], statistics[:, 1])


@pytest.mark.parametrize(("layout", "place", "wrong"), [("planes", 0, math.nan), ("rows", 539, -math.inf)])
def test_nan_and_inf_stay_in_their_channel(place: int, wrong: float, layout: str, tile: int) -> None:
    samples = normal(3, 1.0, 1.0).float()
    clean = B.moments(arranged(samples, layout))
    samples[1].view(-1)[place] = wrong
    x = arranged(samples, layout)
    statistics = B.moments(x)
    assert torch.equal(statistics[:, [0, 2]], clean[:, [0, 2]])
    assert statistics[2, 1].isnan()
    table = settled(x)
    y = B.apply(x, table, None, None, "relu")
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()
    sums = B.gradient_sums(x, x, table, None, None, "silu")
    assert sums[:, [0, 2]].isfinite().all()
    factors = B.settle_gradients(sums, table, 540)[2]
    grad, _ = B.input_gradient(x, x, table, None, None, factors, "silu")
    assert grad[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extreme_magnitudes(layout: str, tile: int) -> None:
    """Subnormal numbers, numbers with squares beyond float32 (of infinite variance, as in torch), and between."""
    samples = torch.cat([normal(1, 0.0, std) for std in (1e-41, 1e15, 1e30)]).float()
    samples = torch.cat([samples, 3e38 + normal(1, 0.0, 1e31).float()])
    x = arranged(samples, layout)
    statistics = B.moments(x).cpu().double()
    mean, variance = exact_statistics(x)
    assert torch.all((statistics[0] - mean).abs() <= 1e-6 * variance.sqrt() + 2**-24 * mean.abs() + 2e-45)
    assert statistics[2, 0] == 0.0
    assert statistics[2, 1] == pytest.approx(float(variance[1]), rel=2e-6)
    assert statistics[2, 2:].isinf().all()
    y = B.apply(x, settled(x), None, None, None)
    assert torch.equal(y[:, 2:], torch.zeros_like(y[:, 2:]))


def test_half_precision_counts_in_float32() -> None:
    """540 numbers around 250 in float16, of which 264 would overflow a sum in float16."""
    for dtype in (torch.float16, torch.bfloat16):
        x = arranged(normal(3, 250.0, 2.0), "planes").to(dtype)
        assert B.moments(x).dtype == torch.float32
        check(x)
    statistics = B.moments(numbers("4d", torch.float64, mean=1e4))
    mean, variance = exact_statistics(numbers("4d", torch.float64, mean=1e4))
    assert statistics.dtype == torch.float64
    torch.testing.assert_close(statistics[0].cpu(), mean, rtol=1e-15, atol=0)
    torch.testing.assert_close(statistics[2].cpu(), variance, rtol=1e-14, atol=0)


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 12), st.integers(1, 2)),
    rows=st.booleans(),
    size=st.sampled_from([32, 128]),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_any_shape(shape: tuple[int, int, int, int], rows: bool, size: int, seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    x = innermost(*shape)(x.flatten()) if rows else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", size)
        patch.setattr(tiles, "RUN", 4)
        patch.setattr(tiles, "SUM_STEPS", (1, 2))
        statistics = B.moments(x).cpu().double()
    samples = x.cpu().double().numpy()
    mean, variance = samples.mean((0, 2, 3)), samples.var((0, 2, 3))
    np.testing.assert_allclose((statistics[0] + statistics[1]).numpy(), mean, atol=1e-6, rtol=0)
    np.testing.assert_allclose(statistics[2].numpy(), variance, atol=1e-6, rtol=2e-6)


@given(
    shape=st.lists(st.integers(1, 1500), min_size=2, max_size=4),
    rows=st.booleans(),
    sums=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_tile_has_a_program(shape: list[int], rows: bool, sums: bool) -> None:
    """And every program has a tile, whatever the size: on tensors without memory."""
    x = torch.empty(shape, device="meta")
    if rows and x.ndim > 2:
        x = torch.empty([shape[0], *shape[2:], shape[1]], device="meta").movedim(-1, 1)
    plan = tiles.plan(x, sums=sums)
    assert plan.block_c * plan.block_s <= tiles.TILE
    assert plan.block_c.bit_count() == plan.block_s.bit_count() == 1
    assert plan.blocks * plan.block_c >= shape[1] > (plan.blocks - 1) * plan.block_c
    assert plan.splits * plan.per_program >= plan.steps > (plan.splits - 1) * plan.per_program
    samples = 1 if plan.rows else shape[0]
    assert samples * plan.plane * shape[1] == x.numel()
    assert plan.steps == samples * math.ceil(plan.plane / plan.block_s)
    assert plan.blocks * plan.splits < 2**31
    # No more programs than are asked for, unless the smallest or largest number of tiles decides.
    low, high = tiles.SUM_STEPS if sums else tiles.APPLY_STEPS
    assert plan.per_program in (low, high) or plan.blocks * plan.splits <= tiles.PROGRAMS + plan.blocks
