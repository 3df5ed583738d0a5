"""`SubmatrixSequential` under checkpoints, autocast, transforms and the compiler."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from batchlab.optim import SubmatrixSGD
from tests.nn.submatrix_chains import (
    CHAINS,
    MODES,
    compare,
    compare_training,
    dense,
    inputs,
    mlp,
    near,
    patterns,
    run,
)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters(mode: str) -> None:
    for frozen in ("weight", "bias", "all"):
        modules = [m.double() for m in mlp()]
        for name, parameter in modules[4].named_parameters():
            parameter.requires_grad_(frozen not in (name, "all"))
        plain, net = nn.Sequential(*copy.deepcopy(modules)), SubmatrixSequential(*modules, mode=mode)
        expected, found = run(plain, inputs((12,)))[1], run(net, inputs((12,)))[1]
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                near(a, b, 1e-12)
        run(net.requires_grad_(False), inputs((12,)))
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_training_forward_without_gradients(mode: str) -> None:
    net, plain = SubmatrixSequential(*mlp(), mode=mode), nn.Sequential(*mlp())
    x = torch.randn(4, 12)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.manual_seed(3)
            y = net(x)
            torch.manual_seed(3)
            torch.testing.assert_close(y, plain(x))
        assert not y.requires_grad


def test_shared_modules() -> None:
    torch.manual_seed(0)
    square, drop, act = nn.Linear(9, 9), BatchwiseDropout(), nn.ReLU()
    modules = [square, act, drop, square, act, drop, square]
    # The same objects in one list: deepcopy keeps the sharing.
    compare([m.double() for m in modules], inputs((9,)))
    compare_training(modules, inputs((9,)))


def test_accumulation_over_batches() -> None:
    modules = [m.double() for m in mlp()]
    sums = []
    for net in (
        nn.Sequential(*copy.deepcopy(modules)),
        *(SubmatrixSequential(*copy.deepcopy(modules), mode=m) for m in MODES),
    ):
        torch.manual_seed(0)
        for seed in range(3):
            net(inputs((12,)) + seed).square().sum().backward()
        sums.append([p.grad for p in net.parameters()])
    for found in sums[1:]:
        for a, b in zip(found, sums[0], strict=True):
            near(a, b, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_double_backward(mode: str) -> None:
    torch.manual_seed(0)
    modules = [
        nn.Linear(6, 9),
        nn.Tanh(),
        BatchwiseDropout(),
        nn.Linear(9, 8),
        nn.ReLU(),
        BatchwiseDropout(),
        nn.Linear(8, 1),
    ]
    modules = [m.double() for m in modules]
    found = []
    for net in (nn.Sequential(*copy.deepcopy(modules)), SubmatrixSequential(*modules, mode=mode)):
        # An optimizer that asks for short gradients changes nothing: with a graph they are dense.
        optimizer = SubmatrixSGD(net.parameters(), lr=0.1)
        x = inputs((6,)).requires_grad_()
        torch.manual_seed(1)
        y = net(x)
        (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        gx.square().sum().backward()
        found.append([x.grad, *(dense(p.grad, p) for p in net.parameters())])
        del optimizer
    for a, b in zip(*found, strict=True):
        near(a, b, 1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("own", [True, False], ids=["own-generator", "default-generator"])
def test_checkpoints_compute_again_with_the_same_patterns(own: bool, mode: str, reentrant: bool) -> None:
    modules = [m.double() for m in mlp()]
    plain = SubmatrixSequential(*copy.deepcopy(modules), mode="mask")
    net = SubmatrixSequential(*modules, mode=mode)
    if own:
        for one in (plain, net):
            for number, module in enumerate(one):
                if isinstance(module, BatchwiseDropout):
                    module.generator = torch.Generator().manual_seed(number)
    expected = run(plain, inputs((12,)))
    found = run(lambda_module(lambda x: checkpoint(net, x, use_reentrant=reentrant), net), inputs((12,)))
    near(found[0], expected[0], 1e-12)
    for a, b in zip(found[1], expected[1], strict=True):
        near(dense(a, b), b, 1e-12)


def lambda_module(function: Callable[[Tensor], Tensor], net: nn.Module) -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return Wrapped()


def test_checkpoint_sequential_of_chains() -> None:
    modules = [m.double() for m in mlp()]
    halves = nn.Sequential(SubmatrixSequential(*modules[:4], mode="submatrix"), SubmatrixSequential(*modules[4:]))
    halves[1].mode = "submatrix"
    expected = run(nn.Sequential(*copy.deepcopy(modules)), inputs((12,)))
    found = run(
        lambda_module(lambda x: checkpoint_sequential(halves, 2, x, use_reentrant=False), halves), inputs((12,))
    )
    for a, b in zip(found[1], expected[1], strict=True):
        near(a, b, 1e-12)


# mode="auto"


def test_auto_under_functional_transforms() -> None:
    net = SubmatrixSequential(*mlp())
    x = torch.randn(4, 12)
    parameters = dict(net.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, values, (x,)).square().sum()

    torch.manual_seed(0)
    found = torch.func.grad(loss)(parameters)
    torch.manual_seed(0)
    loss(parameters).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_forward_differentiation() -> None:
    modules = [m.double() for m in mlp()]
    x, direction = inputs((12,)), inputs((12,)) * 2
    found = []
    for net in (nn.Sequential(*modules), *(SubmatrixSequential(*modules, mode=mode) for mode in MODES)):
        with torch.autograd.forward_ad.dual_level():
            torch.manual_seed(0)
            y = net(torch.autograd.forward_ad.make_dual(x, direction))
            found.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    near(found[1], found[0], 1e-12)
    near(found[2], found[0], 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str) -> None:
    net, plain = SubmatrixSequential(*mlp(), mode=mode), nn.Sequential(*mlp())
    x = torch.randn(8, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y, gradients), (expected, others) = run(net, x), run(plain, x)
    assert y.dtype == torch.bfloat16
    near(y, expected, 0.05)
    for a, b in zip(gradients, others, strict=True):
        near(a, b, 0.1)


# Compiled.


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "convnet", "convnet-our-batch-norm"])
def test_compiles_without_a_graph_break(name: str, mode: str) -> None:
    torch._dynamo.reset()
    make, shape = CHAINS[name]
    eager = SubmatrixSequential(*make(), mode=mode)
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        expected, others = run(eager, inputs(shape).float(), seed)
        net.zero_grad()
        x = inputs(shape).float().requires_grad_()
        torch.manual_seed(seed)
        y = compiled(x)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
        (y * weights).sum().backward()
        near(y, expected, 1e-5)
        for a, b in zip([x.grad, *(p.grad for p in net.parameters())], others, strict=True):
            near(dense(a, b), b, 1e-5)
        assert patterns(net) == patterns(eager)
    for (key, a), (_, b) in zip(net.state_dict().items(), eager.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bernoulli", "own-generator"])
def test_compiles_with_a_graph_break_where_it_must(kind: str) -> None:
    torch._dynamo.reset()
    eager = SubmatrixSequential(*mlp(exact=kind != "bernoulli"), mode="submatrix")
    net = copy.deepcopy(eager)
    if kind == "own-generator":
        for one in (eager, net):
            for number, module in enumerate(one):
                if isinstance(module, BatchwiseDropout):
                    module.generator = torch.Generator().manual_seed(number)
    compiled = torch.compile(net, backend="aot_eager")
    for seed in range(3):
        torch.manual_seed(seed)
        expected = eager(inputs((12,)).float())
        torch.manual_seed(seed)
        near(compiled(inputs((12,)).float()), expected, 1e-5)
        assert patterns(net) == patterns(eager)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bernoulli"])
def test_inductor_draws_the_same_patterns(exact: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = SubmatrixSequential(nn.Linear(6, 20), BatchwiseDropout(exact=exact), nn.Linear(20, 3), mode="submatrix")
    net = copy.deepcopy(eager)
    compiled = torch.compile(net)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = eager(torch.ones(4, 6))
        torch.manual_seed(seed)
        near(compiled(torch.ones(4, 6)), expected, 1e-5)
        assert patterns(net) == patterns(eager)
