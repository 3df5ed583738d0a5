"""The chain on kept rows and columns against the same modules with masks, over random architectures."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import batchlab.nn as ours
from batchlab.functional import SubmatrixGradient
from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from batchlab.optim import SubmatrixSGD

MODES = ("submatrix", "mask")


def run(net: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, list[Tensor | None]]:
    """Output and all gradients, the input's first, of a loss that weighs each output differently."""
    net.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = net(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    (y * weights).sum().backward()
    return y.detach(), [x.grad, *(p.grad for p in net.parameters())]


def dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.to_dense() if isinstance(gradient, SubmatrixGradient) else gradient


def near(a: Tensor, b: Tensor, tolerance: float, what: str = "") -> None:
    assert a.shape == b.shape, what
    assert a.dtype == b.dtype, what
    if a.numel():
        error = (a - b).abs().max().item()
        assert error <= tolerance * max(1.0, b.abs().max().item()), f"{what} differs by {error}"


def patterns(net: nn.Module) -> list[list[int] | None]:
    found = [m.kept for m in net.modules() if isinstance(m, BatchwiseDropout)]
    return [None if kept is None else kept.tolist() for kept in found]


def compare(modules: list[nn.Module], x: Tensor, tolerance: float = 1e-12, seeds: int = 2) -> None:
    """Both modes against `nn.Sequential`, where the same seed draws the same patterns."""
    plain = nn.Sequential(*copy.deepcopy(modules))
    nets = {mode: SubmatrixSequential(*copy.deepcopy(modules), mode=mode) for mode in MODES}
    for seed in range(seeds):
        expected, gradients = run(plain, x, seed)
        for mode, net in nets.items():
            y, found = run(net, x, seed)
            near(y, expected, tolerance, f"{mode}: output")
            names = ["input", *(name for name, _ in net.named_parameters())]
            likes = [x, *net.parameters()]
            for name, a, b, like in zip(names, found, gradients, likes, strict=True):
                near(dense(a, like), dense(b, like), tolerance, f"{mode}: gradient of {name}")
            assert patterns(net) == patterns(plain)
        for (name, a), (_, b) in zip(nets["submatrix"].named_buffers(), nets["mask"].named_buffers(), strict=True):
            near(a, b, tolerance, name)


def compare_training(modules: list[nn.Module], x: Tensor, tolerance: float = 1e-12) -> None:
    """The optimizer changes the same entries in both modes: each gradient says the same about who took part."""
    nets = {mode: SubmatrixSequential(*copy.deepcopy(modules), mode=mode) for mode in MODES}
    for net in nets.values():
        if not list(net.parameters()):
            return
        optimizer = SubmatrixSGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1, nesterov=True)
        for seed in range(3):
            run(net, x, seed)
            optimizer.step()
    for (name, a), (_, b) in zip(
        nets["submatrix"].state_dict().items(), nets["mask"].state_dict().items(), strict=True
    ):
        near(a, b, tolerance, name)


# Random architectures. A place in the chain is (features, spatial sizes, sequence length).

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.LeakyReLU(0.2),
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.Softplus,
    nn.PReLU,
    nn.Identity,
    lambda: nn.Hardtanh(0.1, 1.0),
    lambda: nn.Hardtanh(-1.0, 1.0),
]
RATES = [0.0, 0.2, 0.5, 0.5, 0.5, 0.9, 0.99, 1.0]


def dropout(draw: Any, dim: int = 1) -> BatchwiseDropout:
    return BatchwiseDropout(draw(st.sampled_from(RATES)), exact=draw(st.booleans()), dim=dim)


def batch_norm(draw: Any, features: int, spatial: int) -> nn.Module:
    library = draw(st.sampled_from([nn, ours]))
    options = draw(st.sampled_from([{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}]))
    layer = getattr(library, f"BatchNorm{max(spatial, 1)}d")(features, eps=0.1, **options)
    if layer.weight is not None:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    if draw(st.integers(0, 5)) == 0:
        layer.eval()
    return layer


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(nothing)
    return module


def nothing(module: nn.Module, args: Any, result: Tensor) -> None:
    pass


@st.composite
def vectors(draw: Any, features: int | None = None, most: int = 8) -> tuple[list[nn.Module], tuple[int, ...]]:
    start = features = features or draw(st.sampled_from([1, 3, 8, 17]))
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(2, most))):
        kind = draw(
            st.sampled_from(["linear"] * 4 + ["dropout"] * 4 + ["act"] * 3 + ["bn", "prelu", "other", "nested"])
        )
        if kind == "linear":
            wider = draw(st.sampled_from([1, 2, 5, 16, 19]))
            modules.append(randomized(nn.Linear(features, wider, bias=draw(st.booleans()))))
            features = wider
            if draw(st.integers(0, 9)) == 0:
                hooked(modules[-1])
        elif kind == "dropout":
            modules.append(dropout(draw, draw(st.sampled_from([1, -1]))))
        elif kind == "act":
            modules.append(draw(st.sampled_from(ACTIVATIONS))())
        elif kind == "prelu":
            modules.append(randomized(nn.PReLU(features)))
        elif kind == "bn":
            modules.append(batch_norm(draw, features, 0))
        elif kind == "nested":
            inner, (_, features) = draw(vectors(features, 3))
            container = draw(st.sampled_from([nn.Sequential, SubmatrixSequential]))
            modules.append(container(*inner))
        else:
            modules.append(
                draw(st.sampled_from([nn.Softmax(1), nn.LayerNorm(features), nn.Flatten(), hooked(nn.ReLU())]))
            )
    return modules, (start, features)


@st.composite
def maps(draw: Any) -> tuple[list[nn.Module], tuple[int, ...]]:
    spatial = draw(st.sampled_from([1, 2, 2, 3]))
    size = 9 if spatial < 3 else 6
    start = channels = draw(st.sampled_from([1, 2, 4]))
    sizes = [size] * spatial
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 8))):
        kind = draw(
            st.sampled_from(["conv"] * 4 + ["dropout"] * 4 + ["act"] * 3 + ["bn", "bn", "prelu", "pool", "pool"])
        )
        if kind == "conv":
            wider = draw(st.sampled_from([2, 4, 6]))
            grouped = draw(st.integers(0, 5)) == 0 and channels % 2 == 0
            kernel = min(draw(st.integers(1, 3)), sizes[0])
            module = getattr(nn, f"Conv{spatial}d")(
                channels,
                wider,
                kernel,
                padding=draw(st.sampled_from(["same", 0])),
                bias=draw(st.booleans()),
                groups=2 if grouped else 1,
                padding_mode=draw(st.sampled_from(["zeros", "zeros", "replicate"])),
            )
            modules.append(randomized(module))
            channels = wider
            if module.padding != "same":
                sizes = [s - kernel + 1 for s in sizes]
        elif kind == "dropout":
            modules.append(dropout(draw, draw(st.sampled_from([1, 1, 1, -1 - spatial, -1]))))
        elif kind == "act":
            modules.append(draw(st.sampled_from(ACTIVATIONS))())
        elif kind == "prelu":
            modules.append(randomized(nn.PReLU(channels)))
        elif kind == "bn":
            modules.append(batch_norm(draw, channels, spatial))
        elif sizes[0] >= 2:
            name = draw(st.sampled_from(["MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"]))
            modules.append(getattr(nn, f"{name}{spatial}d")(2))
            sizes = [2 if name.startswith("Adaptive") else s // 2 for s in sizes]
    if draw(st.booleans()):
        modules.append(nn.Flatten())
        features = channels
        for s in sizes:
            features *= s
        tail, _ = draw(vectors(features, 5))
        modules += tail
    return modules, (start, *[size] * spatial)


@st.composite
def sequences(draw: Any) -> tuple[list[nn.Module], tuple[int, ...]]:
    start = features = draw(st.sampled_from([2, 6]))
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 8))):
        kind = draw(st.sampled_from(["linear"] * 4 + ["dropout"] * 4 + ["act"] * 3 + ["norm", "prelu", "bn", "pool"]))
        if kind == "linear":
            wider = draw(st.sampled_from([2, 6, 16]))
            modules.append(randomized(nn.Linear(features, wider)))
            features = wider
        elif kind == "dropout":
            modules.append(dropout(draw, draw(st.sampled_from([-1, -1, 2, 1]))))
        elif kind == "act":
            modules.append(draw(st.sampled_from(ACTIVATIONS))())
        elif kind == "norm":
            modules.append(nn.LayerNorm(features))
        elif kind == "prelu":
            modules.append(randomized(nn.PReLU(5)))
        elif kind == "bn":
            modules.append(batch_norm(draw, 5, 1))
        elif features % 2 == 0 and features > 2:
            modules.append(nn.MaxPool1d(2))  # over features: mixes what a dropout left out
            features //= 2
    return modules, (5, start)


def without_in_place_on_leaf(modules: list[nn.Module]) -> list[nn.Module]:
    """An in-place activation may change neither the input nor what its neighbour remembers; torch refuses it too."""
    for index, module in enumerate(modules):
        inplace = getattr(module, "inplace", False)
        if inplace and (index == 0 or not isinstance(modules[index - 1], (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))):
            module.inplace = False
        if isinstance(module, nn.Sequential):
            without_in_place_on_leaf(list(module))
    return modules


SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def inputs(shape: tuple[int, ...], batch: int = 5) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@SETTINGS
@given(st.data())
def test_vectors_equal_masks(data: Any) -> None:
    torch.manual_seed(0)
    modules, (features, _) = data.draw(vectors())
    modules = [m.double() for m in without_in_place_on_leaf(modules)]
    compare(modules, inputs((features,)))
    compare_training(modules, inputs((features,)))


@SETTINGS
@given(st.data())
def test_maps_equal_masks(data: Any) -> None:
    torch.manual_seed(0)
    modules, shape = data.draw(maps())
    modules = [m.double() for m in without_in_place_on_leaf(modules)]
    compare(modules, inputs(shape), seeds=1)
    compare_training(modules, inputs(shape))


@SETTINGS
@given(st.data())
def test_sequences_equal_masks(data: Any) -> None:
    torch.manual_seed(0)
    modules, shape = data.draw(sequences())
    modules = [m.double() for m in without_in_place_on_leaf(modules)]
    compare(modules, inputs(shape))
    compare_training(modules, inputs(shape))


# Named chains.


def mlp(p: float = 0.5, exact: bool = True) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        BatchwiseDropout(0.2, exact=exact),
        nn.Linear(12, 40),
        nn.ReLU(),
        BatchwiseDropout(p, exact=exact),
        nn.Linear(40, 33),
        nn.ReLU(),
        BatchwiseDropout(p, exact=exact),
        nn.Linear(33, 5),
    ]


def convnet(batch_norm: Any = nn.BatchNorm2d) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Conv2d(3, 8, 3, padding=1),
        batch_norm(8),
        nn.PReLU(8),
        BatchwiseDropout(0.5),
        nn.Conv2d(8, 12, 3),
        batch_norm(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        BatchwiseDropout(0.5),
        nn.Flatten(),
        nn.Linear(12 * 9, 20),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        BatchwiseDropout(0.5),
        nn.Linear(20, 4),
    ]


CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "mlp": (mlp, (12,)),
    "mlp-bernoulli": (lambda: mlp(exact=False), (12,)),
    "convnet": (convnet, (3, 8, 8)),
    "convnet-our-batch-norm": (lambda: convnet(ours.BatchNorm2d), (3, 8, 8)),
}
TOLERANCES = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 0.15}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CHAINS)
def test_dtypes(name: str, dtype: str) -> None:
    make, shape = CHAINS[name]
    cast = getattr(torch, dtype)
    compare([m.to(cast) for m in make()], inputs(shape, 16).to(cast), TOLERANCES[dtype])


@pytest.mark.parametrize("p", [0.0, 0.01, 0.5, 0.97, 0.99, 1.0])
@pytest.mark.parametrize("exact", [True, False])
def test_rates_from_none_to_all(exact: bool, p: float) -> None:
    modules = [m.double() for m in mlp(p, exact)]
    compare(modules, inputs((12,)), seeds=4)
    compare_training(modules, inputs((12,)))
    modules = [m.double() for m in convnet()]
    for module in modules:
        if isinstance(module, BatchwiseDropout):
            module.p, module.exact = p, exact
    compare(modules, inputs((3, 8, 8)), seeds=4)
    compare_training(modules, inputs((3, 8, 8)))


@pytest.mark.parametrize("name", CHAINS)
def test_batch_of_one(name: str) -> None:
    make, shape = CHAINS[name]
    modules = [m.double() for m in make() if not isinstance(m, nn.BatchNorm1d)]
    compare(modules, inputs(shape, 1))


def test_empty_batch() -> None:
    modules = [m.double() for m in mlp()]
    compare(modules, inputs((12,), 0))


@pytest.mark.parametrize("where", ["input", "model", "both"])
def test_channels_last(where: str) -> None:
    modules = [m.double() for m in convnet()]
    x = inputs((3, 8, 8))
    if where != "model":
        x = x.contiguous(memory_format=torch.channels_last)
    if where != "input":
        modules = [m.to(memory_format=torch.channels_last) for m in modules]
    compare(modules, x)
    compare_training(modules, x)


def test_unbatched_convolution() -> None:
    torch.manual_seed(0)
    modules: list[nn.Module] = [
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        BatchwiseDropout(dim=-3),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3),
    ]
    modules = [m.double() for m in modules]
    compare(modules, inputs((9, 9), 3))
    compare_training(modules, inputs((9, 9), 3))
    # The usual dim is then the height, and masks what the layer alone would.
    modules[2].dim = 1
    compare(modules, inputs((9, 9), 3))
    compare([*modules, nn.Flatten(), nn.Linear(1, 2).double()], inputs((9, 9), 3))


def test_linear_on_sequences() -> None:
    modules: list[nn.Module] = [nn.Linear(6, 16), nn.GELU(), BatchwiseDropout(dim=-1), nn.Linear(16, 6)]
    modules = [m.double() for m in modules]
    compare(modules, inputs((7, 6)))
    compare(modules, inputs((2, 7, 6)))
    compare(modules, inputs((), 6))  # one sample without a batch
    with pytest.raises(ValueError, match="without a dimension 1"):
        SubmatrixSequential(nn.Linear(6, 4), BatchwiseDropout(), mode="submatrix")(torch.randn(6))


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
