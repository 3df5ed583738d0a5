"""Batch norm's layers on a GPU with backend="fused": what the interpreter cannot show. Run by `make test-gpu`."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("there is no GPU (torch.cuda.is_available() is False)", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

from batchlab import nn
from batchlab.functional.batch_norm_training import choose_backend
from batchlab.kernels import batch_norm as kernel

if not kernel.available():
    pytest.skip("there is no C++ compiler", allow_module_level=True)

SHAPE = (8, 48, 14, 14)


def batch(seed: int = 0, mean: float = 1.0, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) + mean
    return x.to("cuda", dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


def layers(activation: str | None = "relu") -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """The layer on the kernels, and a copy in float64 by plain operations."""
    fused = nn.BatchNorm2d(SHAPE[1], activation=activation, backend="fused").cuda()
    with torch.no_grad():
        fused.weight.copy_(torch.linspace(-1, 2, SHAPE[1]))
        fused.bias.copy_(torch.linspace(-1, 1, SHAPE[1]))
    plain = copy.deepcopy(fused).double()
    plain.backend = "reference"
    return fused, plain


def step(call: Callable[..., Tensor], parameters: list[Tensor], x: Tensor, residual: Tensor | None) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_()]
    if residual is not None:
        leaves.append(residual.detach().clone().requires_grad_())
    y = call(leaves[0], residual=leaves[1] if residual is not None else None)
    gradient = torch.linspace(-1, 2, y.numel(), device=y.device, dtype=torch.float64).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *parameters], gradient.to(y.dtype))]


def close(found: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, right, strict=True):
        scale = max(float(theirs.abs().max()), 1.0)
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0, atol=tolerance * scale)


def test_the_operations_are_there() -> None:
    assert kernel.available_on_cuda()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_training_and_evaluation(activation: str | None, dtype: torch.dtype, last: bool) -> None:
    fused, plain = layers(activation)
    x, residual = batch(0, 10.0, dtype, last), batch(1, 0.0, dtype, last)
    tolerance = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for training in (True, False):
        for layer in (fused, plain):
            layer.train(training)
        for other in (None, residual):
            found = step(fused, list(fused.parameters()), x, other)
            wide = None if other is None else other.double()
            close(found, step(plain, list(plain.parameters()), x.double(), wide), tolerance)
            assert found[0].stride() == found[1].stride() == x.stride()
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_mean_far_from_zero() -> None:
    fused, plain = layers()
    x = batch(0, 1e4)
    close(step(fused, list(fused.parameters()), x, None), step(plain, list(plain.parameters()), x.double(), None), 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_gradients(training: bool) -> None:
    fused, plain = layers("silu")
    found = []
    for layer, dtype in ((fused, torch.float32), (plain, torch.float64)):
        layer.train(training)
        x = batch().to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).square().mean(), x, create_graph=True)
        found.append(list(torch.autograd.grad(grad.square().sum(), [x, layer.weight])))
    close(*found, 1e-5)


def test_auto_is_not_the_kernel_yet() -> None:
    assert choose_backend("auto", batch(), None, None) == "shifted_aten"
    assert choose_backend("fused", batch(), None, None, batch(1)) == "fused"


def test_the_compiler_is_told_what_comes_out() -> None:
    """Shapes, dtypes, strides and what is changed in place, as the schema and the fake operations say."""
    x, channels = batch(last=True), torch.ones(4, SHAPE[1], device="cuda")
    weight, bias, mean, var = channels.clone().unbind()
    batches = torch.tensor(0, device="cuda")
    checks = ("test_schema", "test_faketensor")
    operations = torch.ops.batchlab_batch_norm
    arguments: tuple[object, ...] = (x, weight, bias, x, mean.clone(), var.clone(), batches, 0.1, 1e-5, 1)
    torch.library.opcheck(operations.forward_.default, arguments, test_utils=checks)
    torch.library.opcheck(operations.evaluate.default, (x, mean, var, weight, bias, x, 1e-5, 1), test_utils=checks)
    torch.library.opcheck(operations.moments.default, (x,), test_utils=checks)
    y, saved = kernel.forward(x, weight, bias, x, None, None, None, 0.1, 1e-5, 1)
    torch.library.opcheck(operations.gradient_sums.default, (x, x, weight, bias, y, None, saved, 1), test_utils=checks)
    arguments = (x, x, weight, bias, y, None, saved, None, 0.0, 1, True)
    torch.library.opcheck(operations.backward.default, arguments, test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile(training: bool) -> None:
    fused, _ = layers()
    other = copy.deepcopy(fused)
    for layer in (fused, other):
        layer.train(training)
    compiled = torch.compile(other, fullgraph=True)
    x, residual = batch(), batch(1)
    for _ in range(2):
        found = step(compiled, list(other.parameters()), x, residual)
        close(found, step(fused, list(fused.parameters()), x, residual), 1e-6)
    for mine, theirs in zip(other.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """A convolution in half precision, then the layer: its parameters and statistics stay in float32."""
    fused, plain = layers()
    convolution = torch.nn.Conv2d(SHAPE[1], SHAPE[1], 1, device="cuda")
    with torch.autocast("cuda", dtype):
        convolved = convolution(batch())
        found = step(fused, list(fused.parameters()), convolved, None)
    assert found[0].dtype == dtype
    assert found[2].dtype == fused.running_var.dtype == torch.float32  # type: ignore[union-attr]
    right = step(plain, list(plain.parameters()), convolved.double(), None)
    close(found, right, 4 * torch.finfo(dtype).eps)


def test_cuda_graph_of_a_whole_step() -> None:
    """Captured once, replayed on other numbers: forward, backward, running statistics and an optimizer's step."""
    fused, _ = layers()
    network = torch.nn.Sequential(torch.nn.Conv2d(SHAPE[1], SHAPE[1], 1), fused).cuda()
    eager = copy.deepcopy(network)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (network, eager)]

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        loss: Tensor = model(x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss

    x = batch()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and tunes
            train(network, optimizers[0], x)
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        train(eager, optimizers[1], x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train(network, optimizers[0], x)
    for seed in range(1, 4):
        x.copy_(batch(seed, mean=seed))
        graph.replay()
        torch.testing.assert_close(loss, train(eager, optimizers[1], x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)
    assert fused.num_batches_tracked.item() == 6  # type: ignore[union-attr]


def test_nothing_waits_for_the_device() -> None:
    fused, _ = layers()
    x, residual = batch().requires_grad_(), batch(1)

    def both() -> None:
        for training in (True, False):
            fused.train(training)
            fused(x, residual=residual).sum().backward()

    both()  # compiles, tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_again() -> None:
    fused, _ = layers("silu")
    x, residual = batch(), batch(1)
    first = step(fused, list(fused.parameters()), x, residual)
    for _ in range(5):
        assert all(map(torch.equal, step(fused, list(fused.parameters()), x, residual), first))
