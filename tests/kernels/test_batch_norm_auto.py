"""`backend="auto"`: what the kernel does not take goes the long way and ends the same, of any size and layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from batchlab import functional
from batchlab import nn as ours
from batchlab.kernels import batch_norm as kernel

pytestmark = pytest.mark.skipif(not kernel.available(), reason="there is no C++ compiler")

CHANNELS = 16
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "half of the channels": lambda x: torch.cat([x, x], 1).chunk(2, 1)[0],
    "every second column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "expanded": lambda x: x[:1].expand_as(x),
}


def close_to_float64(x: Tensor, residual: Tensor, training: bool, activation: str | None = "relu") -> None:
    running = torch.full((CHANNELS,), 0.5), torch.full((CHANNELS,), 2.0)
    wide = [value.double() for value in running]
    with torch.no_grad():
        y = functional.batch_norm(x, *running, training=training, activation=activation, residual=residual)
        expected = functional.batch_norm(
            x.double(), *wide, training=training, activation=activation, residual=residual.double(), backend="reference"
        )
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for value, right in zip(running, wide, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("samples", [2, 40], ids=["small", "large"])  # the library's own memory begins at 128 KiB
@pytest.mark.parametrize("of_residual", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_residual_of_any_layout(layout: str, of_residual: str, samples: int, training: bool) -> None:
    x, residual = (torch.randn(samples, CHANNELS, 14, 14) for _ in range(2))
    close_to_float64(LAYOUTS[layout](x), LAYOUTS[of_residual](residual), training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_a_residual_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype], training: bool) -> None:
    layer, stock = ours.BatchNorm2d(CHANNELS, activation="relu").train(training), nn.BatchNorm2d(CHANNELS)
    x, residual = (torch.randn(8, CHANNELS, 5, 5).to(dtype) for dtype in dtypes)
    x.requires_grad_()
    y = layer(x, residual=residual)
    y.sum().backward()
    expected = torch.relu(stock.train(training).double()(x.double()) + residual.double())
    assert y.dtype == dtypes[0]
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_residual_block_under_autocast() -> None:
    layer, convolution = ours.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 4, 1)
    x = torch.randn(8, 4, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(convolution(x), residual=x)
    torch.testing.assert_close(
        y.float(), torch.relu(nn.BatchNorm2d(4)(convolution(x)) + x).detach(), rtol=5e-2, atol=5e-2
    )


@pytest.mark.parametrize("activation", [None, "relu", "silu", "sigmoid"])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_gradients_to_be_differentiated_keep_their_digits(offset: float, activation: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (offset + torch.randn(256, 64, generator=generator)).requires_grad_()
    g = torch.randn(256, 64, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.detach().to(dtype).requires_grad_()
        backend = "auto" if dtype == torch.float32 else "reference"
        y = functional.batch_norm(leaf, None, None, training=True, activation=activation, backend=backend)
        (first,) = torch.autograd.grad(y, leaf, g.to(dtype), create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        found.append((first.detach().double(), second.double()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_the_kernel_is_insisted_on_in_evaluation_too() -> None:
    mean, var, x = torch.zeros(3), torch.ones(3), torch.randn(4, 3, 6)
    mask = torch.ones(4, 1, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="backend='fused' takes no mask"):
        functional.batch_norm(x, mean, var, backend="fused", mask=mask)
    with pytest.raises(ValueError, match="a residual of x's dtype"):
        functional.batch_norm(x, mean, var, backend="fused", residual=x.double())
    with pytest.raises(ValueError, match="without a gradient"):
        functional.batch_norm(x, mean.requires_grad_(), var, backend="fused")
