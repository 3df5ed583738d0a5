"""The bits that a ReLU behind a residual leaves for the backward pass: as good as its output, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from batchlab import functional
from batchlab.kernels import batch_norm as kernel

pytestmark = pytest.mark.skipif(not kernel.available(), reason="there is no C++ compiler")

RELU, LEAKY = kernel.ACTIVATIONS["relu"], kernel.ACTIVATIONS["leaky_relu"]
SHAPES = [
    *[(8, 16), (37, 33), (5, 3), (300, 65), (64, 1)],
    *[(6, 40, 1), (9, 3, 5), (4, 5, 16), (3, 4, 17), (2, 3, 31), (2, 7, 49), (3, 70, 15)],
    *[(7, 24, 9, 9), (2, 65, 11, 5), (2, 3, 40, 41), (70, 130, 7, 7), (2, 3, 2, 3, 5)],
]
LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}


def _operation(name: str) -> Any:
    return getattr(torch.ops.batchlab_batch_norm, name).default


def _channels_last(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x
    order = LAST[x.dim()]
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(torch.randn(x.shape))


def _forward(x: Tensor, residual: Tensor, activation: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, saved numbers and mask."""
    mask = _operation("empty_relu_mask")(x)
    mask.fill_(0xA5)  # what is not written must not count
    y, saved = _operation("forward_")(x, None, None, residual, None, None, None, 0.1, 1e-5, activation, mask)
    return y, saved, mask


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("activation", [RELU, LEAKY], ids=["relu", "leaky_relu"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_that_the_output_tells(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, activation: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(shape).to(dtype)
    x = _channels_last(x) if last else x
    residual, gradient = _like(x), _like(x)
    y, saved, mask = _forward(x, residual, activation)
    assert torch.equal(_operation("unpack_relu_mask")(mask, x), (y > 0).to(dtype))
    for needed in (False, True):
        by_output = kernel.backward(gradient, x, None, None, y, None, saved, activation, residual_needed=needed)
        by_mask = _operation("backward")(
            gradient, x, None, None, None, None, saved, None, 0.0, activation, needed, mask
        )
        # Sums are rounded as the compiler orders them in each loop; what passes is not rounded at all.
        torch.testing.assert_close(by_mask, by_output, **({} if dtype.itemsize < 8 else {"rtol": 1e-12, "atol": 1e-13}))
        assert torch.equal(by_mask[1], by_output[1])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_is_not_a_number_or_zero_passes_as_in_torch(training: bool, activation: str, last: bool) -> None:
    x = torch.randn(4, 3, 5, 7, dtype=torch.float64)
    x = (_channels_last(x) if last else x).requires_grad_()
    residual = _like(x)
    mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), unbiased=False)
    given = [None, None] if training else [mean, var]
    shown = functional.batch_norm(x.detach(), *given, training=training, backend="reference")
    # Sums of exactly 0 and of -0, of the least number beside 0, of infinities and NaN.
    special = torch.tensor([0.0, -0.0, 5e-324, -5e-324, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    places = torch.arange(x.numel()).view(x.shape) % 11
    for i, value in enumerate(special):
        residual[places == i] = value - torch.where(value.isfinite(), shown[places == i], 0)
    residual.requires_grad_()
    y = functional.batch_norm(x, *given, training=training, activation=activation, residual=residual, backend="fused")
    (found,) = torch.autograd.grad(y, residual, torch.ones_like(y))
    pre = y.detach().clone().requires_grad_()  # a (leaky) ReLU keeps the sign
    behind = getattr(torch.nn.functional, activation)(pre)
    (expected,) = torch.autograd.grad(behind, pre, torch.ones_like(behind))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_mask_takes_a_thirty_second_of_its_output() -> None:
    kept: list[Tensor] = []
    x, residual = torch.randn(2, 8, 64, 32, 32).unbind()
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.batch_norm(x, None, None, training=True, activation="relu", residual=residual, backend="fused")
    assert [t.numel() for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel()] == [x.numel()]
    (mask,) = [t for t in kept if t.dtype == torch.uint8]
    assert x.numel() / 8 <= mask.numel() <= x.numel() / 4 + 4  # twice that on machines with vectors of four


def test_without_a_gradient_there_is_no_mask() -> None:
    x, residual = torch.randn(2, 4, 8, 5, 5).unbind()
    calls: list[str] = []

    class Listening(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    with Listening():
        functional.batch_norm(x, None, None, training=True, activation="relu", residual=residual, backend="fused")
    assert "batchlab_batch_norm::forward_" in calls
    assert "batchlab_batch_norm::empty_relu_mask" not in calls
    calls.clear()
    with Listening():
        x.requires_grad_()
        functional.batch_norm(x, None, None, training=True, activation="relu", residual=residual, backend="fused")
    assert "batchlab_batch_norm::empty_relu_mask" in calls


@pytest.mark.parametrize("name", ["forward_", "backward", "unpack_relu_mask"])
@pytest.mark.parametrize(
    "spoil",
    [lambda m: m[:-1], lambda m: m.float(), lambda m: m[None], lambda m: torch.stack([m, m], 1)[:, 0]],
    ids=["short", "float", "matrix", "strided"],
)
def test_another_mask_is_refused_before_anything_happens(name: str, spoil: Any) -> None:
    x, residual, gradient = torch.randn(3, 4, 8, 5, 5).unbind()
    _, saved, mask = _forward(x, residual, RELU)
    running, wrong = torch.zeros(8), spoil(mask)
    calls = {
        "forward_": (x, None, None, residual, running, running.clone(), None, 0.1, 1e-5, RELU, wrong),
        "backward": (gradient, x, None, None, None, None, saved, None, 0.0, RELU, True, wrong),
        "unpack_relu_mask": (wrong, x),
    }
    with pytest.raises(RuntimeError, match=f"relu_mask must be {mask.numel()} contiguous bytes in uint8 on the CPU"):
        _operation(name)(*calls[name])
    assert not running.any()


def test_a_mask_is_a_relu_s_with_a_residual() -> None:
    x, residual = torch.randn(2, 4, 8, 5, 5).unbind()
    mask = _operation("empty_relu_mask")(x)
    sigmoid = kernel.ACTIVATIONS["sigmoid"]
    with pytest.raises(RuntimeError, match=r"a \(leaky\) ReLU's"):
        _operation("forward_")(x, None, None, residual, None, None, None, 0.1, 1e-5, sigmoid, mask)
    with pytest.raises(RuntimeError, match="has a residual"):
        _operation("forward_")(x, None, None, None, None, None, None, 0.1, 1e-5, RELU, mask)
    with pytest.raises(RuntimeError, match="makes its own relu_mask"):
        _operation("forward_")(x.requires_grad_(), None, None, residual, None, None, None, 0.1, 1e-5, RELU, mask)


def test_what_torch_asks_of_unpacking() -> None:
    x, residual = torch.randn(2, 4, 8, 5, 5).unbind()
    torch.library.opcheck(_operation("unpack_relu_mask"), (_forward(x, residual, RELU)[2], x))
