"""Batch norm's operations for the GPU behind autograd's node and the layer, and what they refuse.

Without a GPU they stand in for the CPU's, in Triton's interpreter: all but the device is then as it will be.
"""

import copy
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from batchlab import nn
from batchlab.functional import batch_norm
from batchlab.functional.batch_norm_training import choose_backend
from batchlab.kernels import batch_norm as kernel
from tests.triton_kernels import ACTIVATIONS, DEVICE, numbers

if not kernel.available():
    pytest.skip("there is no C++ compiler", allow_module_level=True)

from batchlab.kernels import batch_norm_cuda as cuda

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow in the interpreter

OPERATIONS: dict[str, Callable[..., Any]] = {
    "forward_": cuda.forward,
    "evaluate": cuda.evaluate,
    "moments": cuda.moments,
    "gradient_sums": cuda.gradient_sums,
    "backward": cuda.backward,
}


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """The operations that were called; for the length of a test the CPU's are those of the GPU."""
    called: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        operation = OPERATIONS[name]
        parameters = list(inspect.signature(operation).parameters)

        def without_mask(*arguments: Any) -> Any:
            """Of tensors on the CPU, autograd has what a ReLU lets through noted in a mask; the GPU has none."""
            called.append(name)
            if len(arguments) == len(parameters):
                return operation(*arguments)
            *given, mask = arguments
            if name == "backward":
                given[parameters.index("output")] = torch.where(mask, 1.0, -1.0)
                return operation(*given)
            y, saved = operation(*given)
            mask.copy_(y > 0)
            return y, saved

        return without_mask

    library = torch.library.Library("batchlab_batch_norm", "IMPL")  # destroyed below
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the override
        for name in OPERATIONS:
            library.impl(name, noted(name), "CPU", allow_override=True)
        library.impl("empty_relu_mask", lambda x: torch.empty_like(x, dtype=torch.bool), "CPU", allow_override=True)
    try:
        yield called
    finally:
        library._destroy()


def step(layer: torch.nn.Module, x: Tensor, residual: Tensor | None, squared: bool = False) -> list[Tensor]:
    """Output and gradients; or the gradients of these gradients' squares."""
    leaves = [x.detach().clone().requires_grad_(), *layer.parameters()]
    if residual is not None:
        residual = residual.detach().clone().requires_grad_()
        leaves.append(residual)
    y = layer(leaves[0], residual=residual)
    loss = (y.double() * torch.linspace(0.5, 2, y.numel(), device=y.device).view(y.shape)).sum()
    grads = torch.autograd.grad(loss, leaves, create_graph=squared)
    if squared:
        total = torch.stack([grad.double().square().sum() for grad in grads]).sum()
        grads = torch.autograd.grad(total, leaves)
    return [y.detach(), *grads]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer(activation: str | None, with_residual: bool, calls: list[str]) -> None:
    """Training, then evaluation: outputs, gradients and buffers of the layer by plain operations, in float64."""
    x, residual = numbers("4d", torch.float32, mean=10.0), numbers("4d", torch.float32, mean=0.0, seed=2)
    added = residual if with_residual else None
    layer = nn.BatchNorm2d(5, activation=activation, backend="fused").to(DEVICE)
    torch.nn.init.normal_(layer.weight, generator=None if DEVICE == "cuda" else torch.Generator().manual_seed(0))
    plain = copy.deepcopy(layer).double()
    plain.backend = "reference"
    for mode in (True, False):
        layer.train(mode)
        plain.train(mode)
        found = step(layer, x, added)
        right = step(plain, x.double(), None if added is None else added.double())
        for mine, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-5 * max(float(theirs.abs().max()), 1.0))
    for mine, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-6, atol=1e-6)
    if DEVICE == "cpu":
        assert calls == ["forward_", "backward", "evaluate", "backward"]


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_gradients(training: bool, calls: list[str]) -> None:
    x, residual = numbers("channels-last", torch.float64), numbers("channels-last", torch.float64, seed=2)
    layer = nn.BatchNorm2d(5, activation="silu", backend="fused", device=DEVICE).double().train(training)
    plain = copy.deepcopy(layer)
    plain.backend = "reference"
    for mine, theirs in zip(step(layer, x, residual, True), step(plain, x, residual, True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_half_precision_of_a_layer_in_float32(calls: list[str]) -> None:
    """As under autocast: a bfloat16 input, parameters and statistics in float32."""
    x = numbers("4d", torch.bfloat16, mean=10.0)
    layer = nn.BatchNorm2d(5, activation="relu", backend="fused").to(DEVICE)
    y, of_x, of_weight, of_bias = step(layer, x, None)
    right = step(copy.deepcopy(layer).double(), x.double(), None)
    assert (y.dtype, of_x.dtype, of_weight.dtype, of_bias.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    # The output's gradient is rounded too, and then each result.
    for mine, theirs in zip((y, of_x, of_weight, of_bias), right, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2**-6 * max(float(theirs.abs().max()), 1.0))


def wrong(**changed: object) -> tuple[object, ...]:
    channels = torch.ones(3, device=DEVICE)
    given: dict[str, object] = {
        "x": torch.ones(2, 3, 4, device=DEVICE),
        "weight": channels,
        "bias": channels,
        "residual": None,
        "mean": channels.clone(),
        "var": channels.clone(),
        "batches": torch.tensor(0, device=DEVICE),
    }
    return *(given | changed).values(), 0.1, 1e-5, 1


WRONG: list[tuple[dict[str, object], str]] = [
    ({"x": torch.ones(3)}, "channels in dimension 1"),
    ({"x": torch.ones(2, 3, 4, dtype=torch.int32)}, "no kernel for torch.int32"),
    ({"x": torch.ones(2, 3, 8)[..., ::2]}, "neither contiguous nor channels-last"),
    ({"weight": torch.ones(4)}, "weight must be a contiguous vector of 3 channels in torch.float32"),
    ({"bias": torch.ones(3, dtype=torch.float64)}, "bias must be"),
    ({"weight": torch.ones(6)[::2]}, "weight must be"),
    ({"residual": torch.ones(2, 3, 5)}, "residual must have the input's shape"),
    ({"residual": torch.ones(2, 3, 4, dtype=torch.float16)}, "residual must have the input's shape, dtype"),
    ({"var": torch.ones(3, dtype=torch.float16)}, "running statistic must be"),
    ({"mean": torch.ones(3, device="meta")}, "running statistic must be"),
    ({"batches": torch.tensor(0.0)}, "one int64 number"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message for _, message in WRONG])
def test_mistakes_change_nothing(changed: dict[str, object], message: str) -> None:
    moved = {
        name: value.to(DEVICE) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in changed.items()
    }
    arguments = wrong(**moved)
    before = [value.clone() if isinstance(value, Tensor) else value for value in arguments[4:7]]
    with pytest.raises(RuntimeError, match=message):
        cuda.forward(*arguments)  # type: ignore[arg-type]
    for now, then in zip(arguments[4:7], before, strict=True):
        assert isinstance(now, Tensor)
        assert now.is_meta or torch.equal(now, then)  # type: ignore[arg-type]


def test_mistakes_of_a_backward_pass() -> None:
    x = torch.ones(2, 3, 4, device=DEVICE)
    saved, sums = torch.ones(3, 3, device=DEVICE), torch.ones(2, 3, dtype=torch.float64, device=DEVICE)
    for arguments, message in [
        ((x[:1], x, None, None, None, None, saved, sums), "gradient must have"),
        ((x, x, None, None, x.half(), None, saved, sums), "output must have"),
        ((x, x, None, None, None, x[..., 1:], saved, sums), "residual must have"),
        ((x, x, saved[0, 1:], None, None, None, saved, sums), "weight must be"),
        ((x, x, None, None, None, None, saved[:2], sums), "saved must be contiguous"),
        ((x, x, None, None, None, None, saved.double(), sums), "saved must be contiguous"),
        ((x, x, None, None, None, None, saved, sums.float()), "sums must be contiguous"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cuda.backward(*arguments, 1.0, 1, False)
    with pytest.raises(RuntimeError, match="mean must be"):
        cuda.evaluate(x, saved[0, :2], saved[0], None, None, None, 1e-5, 0)


def test_numbers_of_activations_are_the_operations() -> None:
    assert dict(enumerate(cuda.ACTIVATIONS)) == {number: name for name, number in kernel.ACTIVATIONS.items()}


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU, and they are registered for good")
def test_registered_for_the_gpu_and_for_nothing_else() -> None:
    def registered(key: str) -> list[bool]:
        names = [f"batchlab_batch_norm::{name}" for name in OPERATIONS]
        return [torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in names]

    library = torch.library.Library("batchlab_batch_norm", "IMPL")
    try:
        cuda.register(library)
        assert all(registered("CUDA"))
        assert not any(registered("XPU"))
    finally:
        library._destroy()
    assert not any(registered("CUDA"))
    assert not kernel.available_on_cuda()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU, and they are registered for good")
def test_threads_that_come_first_together_register_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[object] = []

    def register(library: object) -> None:
        time.sleep(0.05)
        registered.append(library)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "register", register)
    kernel._load_for_cuda.cache_clear()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda _: kernel.available_on_cuda(), range(4)))
    finally:
        kernel._load_for_cuda.cache_clear()
    assert registered == [kernel.LIBRARY]


def test_backend_auto_is_the_kernel_on_the_cpu_alone() -> None:
    elsewhere = torch.ones(4, 3, device="meta")
    assert choose_backend("auto", elsewhere, None, None) == "shifted_aten"
    with pytest.raises(ValueError, match="a tensor on the CPU or a GPU"):
        choose_backend("fused", elsewhere, None, None)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert choose_backend("auto", x, None, None) == choose_backend("fused", x, None, None) == "fused"


def test_tracked_batches_elsewhere_are_counted_there(calls: list[str]) -> None:
    """A count on another device is moved by plain operations; the kernel counts what is beside its input."""
    x = numbers("4d", torch.float32)
    mean, var = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
    count = torch.tensor(0, device="meta" if DEVICE == "cpu" else "cpu")
    batch_norm(x, mean, var, training=True, backend="fused", num_batches_tracked=count)
    assert (mean != 0).all()
