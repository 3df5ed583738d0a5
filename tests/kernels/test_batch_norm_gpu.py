"""Batch normalization in Triton on a GPU: what the interpreter cannot show. Run by `make test-gpu`."""

from itertools import product

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("there is no GPU (torch.cuda.is_available() is False)", allow_module_level=True)

from tests.triton_kernels import (
    ACTIVATIONS,
    B,
    Step,
    affine,
    error,
    exact_statistics,
    expected,
    innermost,
    numbers,
    ours,
    settled,
    torchs,
)

EPS = 1e-5

# Sizes of networks: large planes, small planes, few channels, many channels, rows, and none a multiple of sixteen.
IMAGES = [(32, 64, 56, 56), (16, 512, 7, 7), (2, 3, 224, 224), (8, 2048, 4, 4), (7, 33, 13, 11)]
SHAPES = [*product(IMAGES, [False, True]), ((4096, 256), False), ((1000, 37), False)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(shape: tuple[int, ...], dtype: torch.dtype, last: bool, seed: int = 0, mean: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return (innermost(*shape)(values.flatten()) if last else values).to("cuda", dtype)


def check(found: Step, right: Step, reference: Step, dtype: torch.dtype) -> None:
    for name in Step._fields:
        value = getattr(right, name)
        if value is None:
            assert getattr(found, name) is None
            continue
        floor = 8 * torch.finfo(dtype).eps * max(float(value.abs().max()), 1.0)
        assert error(getattr(found, name), value) <= 2 * error(getattr(reference, name), value) + floor, name


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "last"), SHAPES, ids=str)
def test_step(shape: tuple[int, ...], last: bool, dtype: torch.dtype, residual: bool) -> None:
    x, grad = batch(shape, dtype, last), batch(shape, dtype, last, seed=1, mean=0.0)
    added = batch(shape, dtype, last, seed=2) if residual else None
    activation = list(ACTIVATIONS)[(sum(shape) + last + 2 * residual) % len(ACTIVATIONS)]
    arguments = (x, *affine(shape[1], dtype), EPS, activation, added, grad)
    check(ours(*arguments), expected(*arguments), torchs(*arguments), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation(dtype: torch.dtype, activation: str | None) -> None:
    x, grad, added = (batch((16, 24, 14, 14), dtype, False, seed=seed) for seed in range(3))
    for other in (None, added):
        arguments = (x, *affine(24, dtype), EPS, activation, other, grad)
        check(ours(*arguments), expected(*arguments), torchs(*arguments), dtype)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_mean_far_from_zero(mean: float, last: bool) -> None:
    x = batch((32, 16, 56, 56), torch.float32, last, mean=mean)
    x[0, 3] = 0  # the first tile of a channel is far off
    statistics = B.moments(x).cpu().double()
    exact, variance = exact_statistics(x)
    assert torch.all((statistics[0] + statistics[1] - exact).abs() <= 2e-6 * variance.sqrt())
    assert torch.all((statistics[2] - variance).abs() <= 2e-6 * variance)


def test_constant_and_broken_channels() -> None:
    x = batch((64, 5, 28, 28), torch.float32, False)
    clean = B.moments(x)
    x[:, 1] = 0.1
    x[63, 3, 27, 27] = float("nan")
    statistics = B.moments(x)
    assert statistics[:, 1].tolist() == [x[0, 1, 0, 0].item(), 0.0, 0.0]
    assert statistics[2, 3].isnan()
    assert torch.equal(statistics[:, [0, 2, 4]], clean[:, [0, 2, 4]])


def test_same_bits_again() -> None:
    """In every run, whatever else is on the device: nothing depends on the order in which programs end."""
    x, grad = batch((32, 3, 112, 112), torch.float32, False), batch((32, 3, 112, 112), torch.float32, False, seed=1)
    arguments = (x, *affine(3, x.dtype), EPS, "silu", None, grad)
    first = ours(*arguments)
    for _ in range(10):
        assert all(a is b or torch.equal(a, b) for a, b in zip(ours(*arguments), first, strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_cuda_graph(last: bool) -> None:
    """A captured step, replayed on other numbers; the first call outside compiles and tunes."""
    shape = (8, 48, 28, 28)
    x, grad, added = (batch(shape, torch.bfloat16, last, seed=seed) for seed in range(3))
    weight, bias = affine(48, x.dtype)
    arguments = (x, weight, bias, EPS, "relu", added, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(*arguments)
    x.copy_(batch(shape, torch.bfloat16, last, seed=3, mean=5.0))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [None if part is None else part.clone() for part in captured]
    for a, b in zip(replayed, ours(*arguments), strict=True):
        assert a is b or torch.equal(a, b)


def test_nothing_waits_for_the_device() -> None:
    x = batch((8, 48, 28, 28), torch.bfloat16, False)
    arguments = (x, *affine(48, x.dtype), EPS, "relu", x, x)
    ours(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_more_than_two_to_the_31_numbers(last: bool) -> None:
    shape = (3, 64, 3456, 3456)
    needed = 6 * 3 * 64 * 3456**2
    free = torch.cuda.mem_get_info()[0]
    if free < needed * 1.2:
        pytest.skip(f"takes {needed * 1.2 / 2**30:.0f} GiB on the GPU, {free / 2**30:.0f} are free")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    x = x.to(memory_format=torch.channels_last) if last else x
    x.zero_()
    channels = torch.arange(64, device="cuda", dtype=torch.bfloat16).view(1, -1, 1, 1)
    x[2, :, 1728:].add_(1 + channels[0])  # one sixth is 1 + channel, five sixths are 0
    statistics = B.moments(x).double()
    value = 1 + torch.arange(64, device="cuda", dtype=torch.float64)
    torch.testing.assert_close(statistics[0], value / 6, rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics[2], value**2 * 5 / 36, rtol=1e-5, atol=0)
    table = settled(x, statistics=statistics.float())
    y = B.apply(x, table, None, None, None)
    assert (y[2, 63, -1, -1].item(), y[0, 0, 0, 0].item()) == pytest.approx((5**0.5, -(0.2**0.5)), rel=1e-2)
    sums = B.gradient_sums(x, x, table, None, None, None).double()
    torch.testing.assert_close(sums[0], value / 6 * (x.numel() // 64), rtol=1e-5, atol=0)


def test_other_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("takes two GPUs")
    x = numbers("4d", torch.float32).to("cuda:1")
    assert B.moments(x).device == x.device
    assert torch.equal(B.moments(x).cpu(), B.moments(x.to("cuda:0")).cpu())
