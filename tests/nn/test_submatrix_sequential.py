"""`SubmatrixSequential` as a module: keys, copies, hooks, running statistics, what `repr` says, `auto`."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchlab.nn as ours
from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from tests.nn.submatrix_chains import CHAINS, MODES, compare, convnet, hooked, inputs, mlp, patterns, run


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("name", CHAINS)
def test_evaluation_is_bitwise_sequential(name: str, mode: str) -> None:
    make, shape = CHAINS[name]
    modules = make()
    net, plain = SubmatrixSequential(*modules, mode=mode), nn.Sequential(*modules)
    net(inputs(shape).float())
    net.eval()
    assert torch.equal(net(inputs(shape).float()), plain(inputs(shape).float()))
    assert patterns(net) == [None] * len(patterns(net))


@pytest.mark.parametrize("name", CHAINS)
def test_state_dicts_load_strictly_both_ways(name: str) -> None:
    make, shape = CHAINS[name]
    plain, net = nn.Sequential(*make()), SubmatrixSequential(*make(), mode="submatrix")
    run(net, inputs(shape).float())
    assert list(net.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(net.state_dict(), strict=True)
    other = SubmatrixSequential(*make())
    other.load_state_dict(plain.state_dict(), strict=True)
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("library", [nn, ours], ids=["torch", "ours"])
def test_running_statistics_of_kept_channels_alone(library: Any, mode: str) -> None:
    torch.manual_seed(0)
    modules = [nn.Conv2d(3, 8, 3), library.BatchNorm2d(8), nn.ReLU(), BatchwiseDropout(), nn.Conv2d(8, 2, 3)]
    plain, net = nn.Sequential(*copy.deepcopy(modules)), SubmatrixSequential(*modules, mode=mode)
    for layer in (plain[1], net[1]):
        layer.running_mean.fill_(0.3)
        layer.running_var.fill_(1.7)
    x = torch.randn(4, 3, 8, 8)
    for one in (plain, net):
        torch.manual_seed(1)
        one(x)
    kept = net[3].kept
    rest = torch.ones(8, dtype=torch.bool).index_fill_(0, kept, False)
    assert 0 < int(rest.sum()) < 8
    for name, start in (("running_mean", 0.3), ("running_var", 1.7)):
        torch.testing.assert_close(getattr(net[1], name)[kept], getattr(plain[1], name)[kept])
        assert torch.equal(getattr(net[1], name)[rest], torch.full((int(rest.sum()),), start))
    assert net[1].num_batches_tracked == 1


@pytest.mark.parametrize("mode", MODES)
def test_running_statistics_rest_where_nothing_is_kept(mode: str) -> None:
    net = SubmatrixSequential(nn.Linear(3, 4), nn.BatchNorm1d(4), BatchwiseDropout(1.0), nn.Linear(4, 2), mode=mode)
    assert torch.equal(net(torch.randn(5, 3)), net[3].bias.expand(5, 2))
    assert torch.equal(net[1].running_mean, torch.zeros(4))
    assert torch.equal(net[1].running_var, torch.ones(4))


def test_slices_and_items() -> None:
    net = SubmatrixSequential(*mlp(), mode="mask")
    assert type(net[1:]) is SubmatrixSequential
    assert len(net[1:]) == 7
    assert net[1] is net[:2][1]
    compare(list(net[1:].double()), inputs((12,)))
    net.append(nn.ReLU())
    net.insert(0, nn.Identity())
    compare(list(net.double()), inputs((12,)))
    del net[0]
    assert len(net) == 9


def test_named_modules() -> None:
    from collections import OrderedDict

    net = SubmatrixSequential(OrderedDict(first=nn.Linear(3, 4), drop=BatchwiseDropout(), last=nn.Linear(4, 2)))
    assert "dropout drop leaves out rows of first and columns of last" in repr(net)
    assert list(net.state_dict()) == ["first.weight", "first.bias", "last.weight", "last.bias"]


def test_a_slice_keeps_the_mode() -> None:
    net = SubmatrixSequential(*mlp(), mode="mask")
    assert net[2:].mode == "mask"


def test_copies_and_pickles() -> None:
    net = SubmatrixSequential(*mlp(), mode="submatrix")
    x = torch.randn(4, 12)
    expected = run(net, x)
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(stream, weights_only=False)):
        assert repr(other) == repr(net)
        y, gradients = run(other, x)
        assert torch.equal(y, expected[0])
        for a, b in zip(gradients, expected[1], strict=True):
            assert torch.equal(a, b)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode is 'fast'; allowed are 'auto', 'submatrix', 'mask'"):
        SubmatrixSequential(nn.Linear(2, 2), mode="fast")
    net = SubmatrixSequential(nn.Linear(2, 2), mode="mask")
    with pytest.raises(ValueError, match="mode is None"):
        net.mode = None
    assert net.mode == "mask"


def lines(net: nn.Module) -> list[str]:
    return [line.strip() for line in repr(net).splitlines() if line.strip().startswith("dropout ")]


def test_repr_of_a_convolutional_chain() -> None:
    assert lines(SubmatrixSequential(*convnet())) == [
        "dropout 3 leaves out rows of 0 and columns of 4",
        "dropout 8 leaves out rows of 4 and columns of 10",
        "dropout 13 leaves out rows of 10 and columns of 14",
    ]


REPRS: dict[str, tuple[Callable[[], list[nn.Module]], list[str]]] = {
    "sigmoid-behind": (
        lambda: [nn.Linear(2, 4), BatchwiseDropout(), nn.Sigmoid(), nn.Linear(4, 2)],
        ["dropout 1 leaves out rows of 0, and masks before 2 (Sigmoid)"],
    ),
    "batch-norm-behind": (
        lambda: [nn.Linear(2, 4), BatchwiseDropout(), nn.BatchNorm1d(4), nn.Linear(4, 2)],
        ["dropout 1 leaves out rows of 0, and masks before 2 (BatchNorm1d)"],
    ),
    "last": (
        lambda: [nn.Linear(2, 4), BatchwiseDropout()],
        ["dropout 1 leaves out rows of 0, and masks before the end"],
    ),
    "softmax-before": (
        lambda: [nn.Linear(2, 4), nn.Softmax(1), BatchwiseDropout(), nn.Linear(4, 2)],
        ["dropout 2 leaves out columns of 3"],
    ),
    "grouped": (
        lambda: [nn.Conv2d(2, 4, 1, groups=2), BatchwiseDropout(), nn.Conv2d(4, 4, 1, groups=2)],
        ["dropout 1 leaves out nothing, and masks before 2 (Conv2d)"],
    ),
    "hooked-dropout": (
        lambda: [BatchwiseDropout(), nn.Linear(2, 4), hooked(BatchwiseDropout()), nn.Linear(4, 2)],
        ["dropout 0 leaves out columns of 1", "dropout 2 leaves out nothing, and masks"],
    ),
    "nothing-dropped": (lambda: [nn.Linear(2, 4), BatchwiseDropout(0.0), nn.Linear(4, 2)], []),
    "nested": (
        lambda: [nn.Sequential(nn.Linear(2, 4), nn.ReLU()), nn.Sequential(BatchwiseDropout(), nn.Linear(4, 2))],
        ["dropout 1.0 leaves out rows of 0.0 and columns of 1.1"],
    ),
    "two": (
        lambda: [nn.Linear(2, 4), BatchwiseDropout(), BatchwiseDropout(), nn.Linear(4, 2)],
        ["dropout 1 leaves out rows of 0, and masks before 2 (BatchwiseDropout)", "dropout 2 leaves out columns of 3"],
    ),
    "plain-average": (
        lambda: [nn.Linear(2, 4), nn.BatchNorm1d(4, momentum=None), BatchwiseDropout(), nn.Linear(4, 2)],
        ["dropout 2 leaves out columns of 3"],
    ),
}


@pytest.mark.parametrize("name", REPRS)
def test_repr_says_what_is_saved(name: str) -> None:
    make, expected = REPRS[name]
    modules = make()
    assert lines(SubmatrixSequential(*modules)) == expected
    assert lines(SubmatrixSequential(*modules).eval()) == expected


@pytest.mark.parametrize("mode", MODES)
def test_hooks_are_called_and_see_everything(mode: str) -> None:
    modules = mlp()
    seen: dict[str, Any] = {}

    def see(module: nn.Module, args: tuple[Tensor], result: Tensor) -> None:
        seen["input"], seen["output"] = args[0].detach(), result.detach()

    plain = nn.Sequential(*copy.deepcopy(modules))
    modules[4].register_forward_hook(see)
    net = SubmatrixSequential(*modules, mode=mode)
    y, _ = run(net, torch.ones(3, 12))
    assert seen["input"].shape == (3, 40)
    assert seen["output"].shape == (3, 33)
    assert ((seen["input"] == 0).all(0)).sum() >= 20
    torch.testing.assert_close(y, run(plain, torch.ones(3, 12))[0])


def test_a_hook_on_the_chain_and_on_a_nested_one() -> None:
    calls = []
    inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    inner.register_forward_pre_hook(lambda module, args: calls.append("inner"))
    net = SubmatrixSequential(inner, BatchwiseDropout(), nn.Linear(6, 2), mode="submatrix")
    net.register_forward_hook(lambda module, args, y: calls.append("outer"))
    net(torch.randn(3, 4))
    assert calls == ["inner", "outer"]


def test_auto_leaves_everything_as_it_was() -> None:
    modules = convnet()
    modules[3].generator = torch.Generator().manual_seed(5)
    net = SubmatrixSequential(*modules)
    calls = []
    modules[10].register_forward_hook(lambda *a: calls.append(1))
    modules[10].register_full_backward_hook(lambda *a: calls.append(2))
    x = torch.randn(6, 3, 8, 8, requires_grad=True)
    net(x).sum().backward()
    assert calls == [1, 2]  # not those of the measurement
    twin = copy.deepcopy(net)
    twin._faster = dict(net._faster)
    net._faster.clear()
    for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
        parameter.grad = torch.ones_like(parameter)
        other.grad = torch.ones_like(parameter)
    for one in (net, twin):
        torch.manual_seed(4)
        one.result = one(x)
        one.state = torch.get_rng_state()
    torch.testing.assert_close(net.result, twin.result)  # perhaps another mode, so not to the bit
    assert torch.equal(net.state, twin.state)
    assert patterns(net) == patterns(twin)
    assert torch.equal(modules[3].generator.get_state(), twin[3].generator.get_state())
    for (name, a), (_, b) in zip(net.state_dict().items(), twin.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())


def test_auto_chooses_once_per_size() -> None:
    net = SubmatrixSequential(*mlp())
    assert net.mode == "auto"
    for _ in range(3):
        net(torch.randn(8, 12))
    assert len(net._faster) == 1
    assert set(net._faster.values()) <= set(MODES)
    net(torch.randn(64, 12))
    assert len(net._faster) == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.5, 0.01], ids=["half", "all kept"])
@pytest.mark.parametrize("first", [nn.ReLU, nn.Sigmoid])
def test_an_activation_in_place_behind_a_dropout(first: type[nn.Module], p: float, mode: str) -> None:
    # With p = 0.01 all of 6 features are kept, and the factor is 1: there is no new tensor by itself.
    modules = [nn.Linear(4, 6), first(), BatchwiseDropout(p), nn.LeakyReLU(inplace=True), nn.Linear(6, 3)]
    net, plain = SubmatrixSequential(*modules, mode=mode).double(), nn.Sequential(*copy.deepcopy(modules)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    y, gradients = run(net, x)
    expected, plain_gradients = run(plain, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for ours_, theirs in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-12, atol=1e-12)


def test_a_forward_of_the_instances_own_is_called() -> None:
    net = SubmatrixSequential(nn.Linear(4, 6), BatchwiseDropout(0.5), nn.Linear(6, 3), mode="submatrix")
    seen: list[torch.Size] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return nn.functional.linear(x, net[2].weight)

    net[2].forward = forward
    net(torch.randn(5, 4))
    assert seen == [torch.Size([5, 6])]  # all features, zeros at the dropped ones
    assert "masks before 2" in repr(net)


def test_auto_with_what_deepcopy_refuses() -> None:
    net = SubmatrixSequential(nn.Linear(4, 6), BatchwiseDropout(0.5), nn.utils.weight_norm(nn.Linear(6, 3)))
    net(torch.randn(5, 4))
    net(torch.randn(5, 4)).sum().backward()  # weight_norm's weight is inside a graph now

    class Stubborn(nn.Identity):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    SubmatrixSequential(nn.Linear(4, 6), BatchwiseDropout(0.5), Stubborn())(torch.randn(5, 4)).sum().backward()


def test_a_flattened_map_is_put_back_among_zeros() -> None:
    modules = [nn.Conv2d(2, 6, 3), BatchwiseDropout(0.5), nn.Flatten(), nn.Sigmoid(), nn.Linear(24, 3)]
    compare([m.double() for m in modules], inputs((2, 4, 4)))
