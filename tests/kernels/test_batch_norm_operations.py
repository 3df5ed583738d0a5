"""Batch norm's compiled operations as torch sees them: schema, shapes for compilers, graphs, version counters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from batchlab import nn
from batchlab.kernels import batch_norm as kernel
from batchlab.kernels.build import BuildError, find_compiler

pytestmark = pytest.mark.skipif(not kernel.available(), reason="there is no C++ compiler")

RELU, SILU = kernel.ACTIVATIONS["relu"], kernel.ACTIVATIONS["silu"]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _operation(name: str) -> Any:
    return getattr(torch.ops.batchlab_batch_norm, name).default


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _input(shape: tuple[int, ...], last: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAST[len(shape)] if last else torch.contiguous_format)


def _vectors(x: Tensor, count: int) -> list[Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [torch.rand(x.shape[1], dtype=dtype) + 0.5 for _ in range(count)]


Arguments = tuple[Any, ...]


def _calls(x: Tensor, full: bool, leaves: bool = False) -> dict[str, Arguments]:
    """Arguments of every operation, with all that is optional or with none of it."""
    weight, bias, mean, variance = _vectors(x, 4)
    residual = torch.empty_like(x).copy_(torch.randn(x.shape))
    y, saved = kernel.forward(x, weight, bias, residual if full else None, None, None, None, 0.1, 1e-5, RELU)
    gradient = torch.empty_like(x).copy_(torch.randn(x.shape))
    sums = kernel.gradient_sums(gradient, x, weight, bias, y, None, saved, RELU)
    if leaves:
        x, weight, bias, residual = (t.clone().requires_grad_() for t in (x, weight, bias, residual))
    given = (weight, bias, residual) if full else (None, None, None)
    known = (*given[:2], *((y, None) if full else (None, None)))
    running = (mean, variance, torch.tensor(3)) if full else (None, None, None)
    return {
        "forward_": (x, *given, *running, 0.1, 1e-5, SILU if full else 0),
        "evaluate": (x, mean, variance, *given, 1e-5, SILU if full else 0),
        "moments": (x,),
        "gradient_sums": (gradient, x, *known, saved, RELU if full else 0),
        "backward": (
            gradient,
            x,
            *given[:2],
            *((y, residual, saved, sums, 11.0, RELU, True) if full else (None, None, saved, None, 0.0, 0, False)),
        ),
    }


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("name", ["forward_", "evaluate"])
@pytest.mark.parametrize(("shape", "last"), [((6, 3), False), ((2, 3, 4, 5), False), ((2, 3, 4, 5), True)], ids=str)
def test_what_torch_asks_of_an_operation_with_gradients(
    name: str, full: bool, shape: tuple[int, ...], last: bool
) -> None:
    torch.library.opcheck(_operation(name), _calls(_input(shape, last), full, leaves=True)[name])


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("name", ["forward_", "evaluate", "moments", "gradient_sums", "backward"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
def test_what_torch_asks_of_an_operation(name: str, full: bool, last: bool) -> None:
    torch.library.opcheck(_operation(name), _calls(_input((3, 5, 3, 2), last), full)[name])


# Every input that `is_dense`, with strides that only size 1 excuses among them.
DENSE: dict[str, Callable[[], Tensor]] = {
    "(N, C)": lambda: torch.randn(4, 3),
    "(N, C) bfloat16": lambda: torch.randn(4, 3).bfloat16(),
    "(N, C) float64": lambda: torch.randn(4, 3).double(),
    "(N, C, L) float16": lambda: torch.randn(4, 3, 5).half(),
    "one channel": lambda: torch.randn(4, 1),
    "one number": lambda: torch.randn(1, 1),
    "one position": lambda: torch.randn(4, 3, 1, 1),
    "one sample": lambda: torch.randn(1, 3, 4, 5),
    "contiguous float64": lambda: torch.randn(2, 3, 4, 5).double(),
    "channels last": lambda: _input((2, 3, 4, 5), last=True),
    "channels last, one channel": lambda: _input((2, 1, 4, 5), last=True),
    "channels last, one position": lambda: _input((2, 3, 1, 1), last=True),
    "channels last 3d": lambda: _input((2, 3, 2, 3, 2), last=True),
    "channels last 3d bfloat16": lambda: _input((1, 3, 2, 3, 2), last=True, dtype=torch.bfloat16),
    "(N, L, C) transposed": lambda: torch.randn(2, 5, 3).transpose(1, 2),
    "expanded to one sample": lambda: torch.randn(3, 4).expand(1, 3, 4),
    "any stride at one channel": lambda: torch.randn(16).as_strided((5, 1, 3), (3, 99, 1)),
    "any stride at one position": lambda: torch.randn(15).as_strided((5, 3, 1), (3, 1, 77)),
    "no sample": lambda: torch.randn(0, 3, 4),
    "no channel": lambda: torch.randn(2, 0, 4),
}


def _described(results: Any) -> list[tuple[Any, ...]]:
    results = (results,) if isinstance(results, Tensor) else results
    return [(tuple(t.shape), t.stride(), t.dtype, t.device, t.layout) for t in results]


@pytest.mark.parametrize("kind", DENSE)
def test_compilers_are_told_what_the_operations_return(kind: str) -> None:
    x = DENSE[kind]()
    assert kernel.is_dense(x)
    for full in (False, True):
        calls = _calls(x, full)
        for name, arguments in calls.items():
            mode = FakeTensorMode()
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            with mode:
                told = _described(_operation(name)(*fakes))
            assert told == _described(_operation(name)(*arguments)), name


class _Network(torch.nn.Module):
    """A convolution, two batch norms with all they can do, and a sum."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.BatchNorm2d(4, activation="relu")
        self.second = nn.BatchNorm2d(4, activation="silu")
        self.third = nn.BatchNorm1d(4)
        if last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        start: Tensor = self.convolution(x)
        y: Tensor = self.second(self.first(start), residual=start)
        return self.third(y.mean((2, 3)))  # type: ignore[no-any-return]


def _step(run: Callable[[Tensor], Tensor], net: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one step."""
    net.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = run(x)
    y.pow(3).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [x.grad, *(p.grad for p in net.parameters())]
    assert all(g is not None for g in gradients)
    return [y.detach(), *(g.clone() for g in gradients if g is not None)]


def _same_state(one: torch.nn.Module, other: torch.nn.Module) -> None:
    state = other.state_dict()
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, state[key], msg=lambda text, key=key: f"{key}: {text}")


class _Recorder:
    """A backend of torch.compile that keeps the graphs and hands them on."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def count(self, name: str) -> int:
        return sum(node.target is _operation(name) for graph in self.graphs for node in graph.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
def test_a_compiled_network_calls_the_operations(last: bool) -> None:
    eager = _Network(last)
    net = copy.deepcopy(eager)
    recorder = _Recorder()
    compiled = torch.compile(net, fullgraph=True, backend=recorder)
    for _ in range(2):
        x = _input((4, 3, 5, 5), last)
        for ours, expected in zip(_step(compiled, net, x), _step(eager, eager, x), strict=True):
            torch.testing.assert_close(ours, expected)
    assert recorder.count("forward_") == 3
    assert recorder.count("evaluate") == 0
    _same_state(net, eager)
    assert net.first.num_batches_tracked == 2
    net.eval()
    eager.eval()
    recorder.graphs.clear()
    x = _input((4, 3, 5, 5), last)
    for ours, expected in zip(_step(compiled, net, x), _step(eager, eager, x), strict=True):
        torch.testing.assert_close(ours, expected)
    assert recorder.count("evaluate") == 3
    assert recorder.count("forward_") == 0
    _same_state(net, eager)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_one_graph_serves_all_batch_sizes(training: bool) -> None:
    eager = _Network().train(training)
    net = copy.deepcopy(eager)
    recorder = _Recorder()
    compiled = torch.compile(net, fullgraph=True, backend=recorder, dynamic=True)
    graphs = set()
    for samples, size in ((4, 5), (7, 5), (3, 8), (15, 6)):  # from 16 on torch's convolution is another one
        x = _input((samples, 3, size, size))
        for ours, expected in zip(_step(compiled, net, x), _step(eager, eager, x), strict=True):
            torch.testing.assert_close(ours, expected)
        graphs.add(len(recorder.graphs))
    assert len(graphs) == 1
    _same_state(net, eager)


def _compiler_is_there() -> bool:
    try:
        return bool(find_compiler())
    except BuildError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _compiler_is_there(), reason="there is no C++ compiler")
def test_inductor_gives_the_same() -> None:
    eager = _Network()
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, fullgraph=True, backend="inductor")
    for _ in range(2):
        x = _input((4, 3, 5, 5))
        for ours, expected in zip(_step(compiled, net, x), _step(eager, eager, x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    _same_state(net, eager)


def _moved(layer: torch.nn.Module, name: str, x: Tensor) -> None:
    """A loss that saves a buffer, then a training step that moves it, then the loss's gradient."""
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * getattr(layer, name)).sum()
    layer(x)
    loss.backward()


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
@pytest.mark.parametrize("differentiated", [False, True])
def test_a_gradient_notices_that_statistics_it_saved_have_moved(name: str, differentiated: bool) -> None:
    x = torch.randn(6, 3, requires_grad=differentiated)
    for backend in ("fused", "reference"):  # torch's own layer moves its running mean unnoticed
        layer = nn.BatchNorm1d(3, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            _moved(layer, name, x)
        _moved(layer.eval(), name, x)  # evaluation moves nothing


def test_evaluation_leaves_the_version_of_the_statistics_alone() -> None:
    layer = nn.BatchNorm1d(3, backend="fused").eval()
    before = [buffer._version for buffer in layer.buffers()]
    layer(torch.randn(6, 3, requires_grad=True)).sum().backward()
    assert [buffer._version for buffer in layer.buffers()] == before


def test_in_inference_mode_the_statistics_move_as_without_it() -> None:
    plain = nn.BatchNorm1d(3, backend="fused")
    other = copy.deepcopy(plain)
    x = torch.randn(6, 3)
    expected = plain(x)
    with torch.inference_mode():
        assert torch.equal(other(x), expected)
    _same_state(other, plain)


def test_a_view_with_the_sign_turned_is_read_with_its_sign() -> None:
    x, weight = torch.randn(6, 3), torch.randn(3)
    turned, plain = torch._neg_view(x).requires_grad_(), (-x).requires_grad_()
    results = []
    for values in (turned, plain):
        y, _ = kernel.forward(values, torch._neg_view(weight), None, None, None, None, None, 0.1, 1e-5, SILU)
        (gradient,) = torch.autograd.grad(y.pow(2).sum(), values)
        results.append((y.detach(), gradient))
    torch.testing.assert_close(results[0], results[1], rtol=0.0, atol=0.0)
    y, _ = kernel.forward(-x, -weight, None, None, None, None, None, 0.1, 1e-5, SILU)
    assert torch.equal(results[0][0], y)
