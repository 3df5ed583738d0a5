"""The factored layers: torch's in every respect but the weight, which is what its factors say."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import batchlab.nn as ours
from batchlab.reference.factored import CENTERED, FACTORIZATIONS

LAYERS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "Linear": ((5, 4), {}, (3, 5)),
    "Linear-no-bias": ((5, 4, False), {}, (2, 3, 5)),
    "Conv1d": ((4, 6, 3), {"padding": 1, "groups": 2}, (2, 4, 9)),
    "Conv2d": ((4, 6, (3, 2)), {"stride": 2, "dilation": 2, "padding": 2, "padding_mode": "reflect"}, (2, 4, 9, 8)),
    "Conv2d-same": ((4, 4, 3), {"padding": "same", "groups": 4, "bias": False}, (2, 4, 5, 5)),
    "Conv2d-circular": ((2, 3, 3), {"padding": 1, "padding_mode": "circular"}, (2, 5, 5)),
    "Conv3d": ((2, 3, 2), {"padding_mode": "replicate", "padding": 1}, (2, 2, 4, 3, 3)),
}


def stock(name: str, **options: Any) -> Any:
    args, kwargs, _ = LAYERS[name]
    return getattr(nn, name.split("-")[0])(*args, **kwargs, **options)


def make(name: str, factorization: str = "weight_norm", **options: Any) -> Any:
    args, kwargs, _ = LAYERS[name]
    cls = getattr(ours, "Factored" + name.split("-")[0])
    return cls(*args, **kwargs, **options, factorization=factorization)


def batch(name: str, seed: int = 0) -> Tensor:
    return torch.randn(LAYERS[name][2], generator=torch.Generator().manual_seed(seed))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_starts_as_torch_and_computes_what_its_weight_says(name: str, factorization: str) -> None:
    torch.manual_seed(3)
    plain = stock(name)
    torch.manual_seed(3)
    layer = make(name, factorization)
    assert isinstance(layer, type(plain))
    expected = plain.weight.detach()
    if factorization in CENTERED:
        expected = expected - expected.mean(list(range(1, expected.ndim)), keepdim=True)
        torch.testing.assert_close(layer.weight, expected)
    else:
        assert torch.equal(layer.weight, expected)
    with torch.no_grad():
        plain.weight.copy_(layer.eval().weight)
    x = batch(name)
    assert torch.equal(layer(x), plain(x))
    assert repr(layer) == f"Factored{repr(plain)[:-1]}, factorization={factorization!r})"


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_trains_as_torchs_parametrization(name: str, kind: str, optimizer: type[torch.optim.Optimizer]) -> None:
    theirs = getattr(parametrizations, kind)(stock(name))
    mine = make(name, kind)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    if kind == "spectral_norm":
        assert torch.equal(mine.g, torch.ones_like(mine.g))
        mine.g.requires_grad_(False)
    optimizers = [optimizer([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (mine, theirs)]  # type: ignore[call-arg]
    for seed in range(4):
        outputs = [layer(batch(name, seed)) for layer in (mine, theirs)]
        torch.testing.assert_close(*outputs)
        for y, step in zip(outputs, optimizers, strict=True):
            step.zero_grad()
            y.square().mean().backward()
            step.step()
    mine.eval()
    theirs.eval()
    torch.testing.assert_close(mine(batch(name)), theirs(batch(name)))
    torch.testing.assert_close(mine.weight, theirs.weight)
    if kind == "spectral_norm":
        torch.testing.assert_close(mine.left, theirs.parametrizations.weight[0]._u)
        torch.testing.assert_close(mine.right, theirs.parametrizations.weight[0]._v)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_loads_the_keys_of_torchs_older_functions(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = getattr(nn.utils, kind)(stock("Conv2d"))
    old(batch("Conv2d"))
    layer = make("Conv2d", kind)
    nested = nn.Sequential(layer)
    nested.load_state_dict({f"0.{key}": value for key, value in old.state_dict().items()}, strict=True)
    torch.testing.assert_close(layer.eval()(batch("Conv2d")), old.eval()(batch("Conv2d")))


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("name", ["Linear", "Conv2d-same"])
def test_state_dicts_of_stock_layers(name: str, factorization: str) -> None:
    source, layer = make(name, factorization), make(name, factorization)
    source(batch(name))
    plain = source.merged()
    layer.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(layer.eval()(batch(name)), plain.eval()(batch(name)))
    other = stock(name)
    other.load_state_dict(layer.merged().state_dict(), strict=True)
    torch.testing.assert_close(other(batch(name)), plain(batch(name)))
    twin = make(name, factorization)
    twin.load_state_dict(source.state_dict(), strict=True)
    assert same(twin.state_dict(), source.state_dict())
    if factorization in CENTERED:
        with pytest.raises(RuntimeError, match=r"weight cannot be factored: .* has no weights with a mean"):
            layer.load_state_dict(stock(name).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for v"):
        ours.FactoredLinear(3, 2).load_state_dict(nn.Linear(4, 2).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_a_checkpoint_in_half_precision_loses_nothing_more(factorization: str) -> None:
    half = make("Conv2d", factorization).bfloat16().merged()
    layer = make("Conv2d", factorization)
    layer.load_state_dict(half.state_dict(), strict=True)
    assert layer.g.dtype == torch.float32
    expected = half.weight.detach().float()
    if factorization in CENTERED:  # the rounding of a mean that was zero
        expected = expected - expected.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_from_a_stock_layer_and_back(name: str, factorization: str) -> None:
    plain = stock(name, dtype=torch.float64).eval()
    plain.weight.requires_grad_(False)
    cls = getattr(ours, "Factored" + name.split("-")[0])
    if factorization in CENTERED:
        with pytest.raises(ValueError, match="would be lost"):
            cls.from_module(plain, factorization)
        with torch.no_grad():
            dims = list(range(1, plain.weight.ndim))
            plain.weight.sub_(plain.weight.mean(dims, keepdim=True))
    before, x = copy.deepcopy(plain), batch(name).double()
    layer = cls.from_module(plain, factorization)
    assert layer.v is plain.weight
    assert layer.bias is plain.bias
    assert not layer.training
    assert not layer.g.requires_grad
    assert layer.g.dtype == torch.float64
    for _ in range(2):  # the singular vectors are exact, so training does not move them
        torch.testing.assert_close(layer(x), before(x), rtol=1e-13, atol=1e-13)
        layer.train()
    back = layer.merged()
    assert type(back) is type(plain)
    assert back.bias is plain.bias
    assert back.weight is not layer.v
    torch.testing.assert_close(back.weight, before.weight, rtol=1e-14, atol=1e-15)
    assert repr(back) == repr(before)
    assert same(plain.state_dict(), before.state_dict())


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 0, 1, 1], [2, 2, 2, 2]])
def test_training_does_not_move_the_singular_vectors_of_equal_singular_values(rows: list[int]) -> None:
    plain = nn.Linear(4, 4)
    with torch.no_grad():
        plain.weight.copy_(3 * torch.eye(4)[rows])  # all, two or one of them the largest
    layer, x = ours.FactoredLinear.from_module(plain, "spectral_norm"), batch("Linear")[:, :4]
    for _ in range(5):
        torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.g.flatten(), torch.linalg.matrix_norm(plain.weight, 2).view(1))


def test_a_mean_is_dropped_only_when_asked() -> None:
    plain = nn.Linear(5, 3)
    layer = ours.FactoredLinear.from_module(plain, "centered_weight_norm", project=True)
    torch.testing.assert_close(layer.weight, plain.weight - plain.weight.mean(1, keepdim=True))


def test_what_from_module_refuses() -> None:
    class Mine(nn.Linear):
        pass

    for module in (Mine(3, 2), nn.Conv2d(3, 2, 1), ours.FactoredLinear(3, 2), nn.LazyLinear(3)):
        with pytest.raises(TypeError, match=r"needs a torch\.nn\.Linear"):
            ours.FactoredLinear.from_module(module)
    with pytest.raises(TypeError, match="got ParametrizedLinear"):
        ours.FactoredLinear.from_module(parametrizations.weight_norm(nn.Linear(3, 2)))
    patched = nn.Linear(3, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign, assignment, misc]
    with pytest.raises(TypeError, match="patched"):
        ours.FactoredLinear.from_module(patched)
    for factorization in CENTERED:
        with pytest.raises(ValueError, match="one weight per unit"):
            ours.FactoredConv2d(4, 4, 1, groups=4, factorization=factorization)
        with pytest.raises(ValueError, match="one weight per unit"):
            ours.FactoredLinear.from_module(nn.Linear(1, 2), factorization, project=True)
    with pytest.raises(ValueError, match="allowed are"):
        ours.FactoredLinear(3, 2, factorization="path")
    with pytest.raises(ValueError, match="eps is 0"):
        ours.FactoredLinear(3, 2, eps=0)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_copies_and_pickles(factorization: str) -> None:
    layer = make("Conv2d", factorization)
    layer(batch("Conv2d")).sum().backward()
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    layer.eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert repr(other) == repr(layer)
        assert same(other.state_dict(), layer.state_dict())
        assert torch.equal(other.eval()(batch("Conv2d")), layer(batch("Conv2d")))


def test_the_weight_is_read_only() -> None:
    layer = ours.FactoredLinear(3, 2)
    for value in (torch.ones(2, 3), nn.Parameter(torch.ones(2, 3))):
        with pytest.raises(AttributeError, match=r"use layer\.set_weight"):
            layer.weight = value
    wanted = nn.init.orthogonal_(torch.empty(2, 3))
    layer.set_weight(wanted)
    assert torch.equal(layer.weight, wanted)
    before = copy.deepcopy(layer.state_dict())
    for bad, match in ((torch.ones(3, 2), "has shape"), (torch.full((2, 3), float("nan")), "NaN")):
        with pytest.raises(ValueError, match=match):
            layer.set_weight(bad)
    assert same(layer.state_dict(), before)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_set_weight_and_reset(factorization: str) -> None:
    layer = make("Linear", factorization)
    wanted = torch.randn(4, 5)
    wanted = wanted - wanted.mean(1, keepdim=True)
    objects = [id(p) for p in layer.parameters()]
    layer.set_weight(wanted)
    torch.testing.assert_close(layer.weight, wanted)
    torch.manual_seed(8)
    layer.reset_parameters()
    torch.manual_seed(8)
    plain = nn.Linear(5, 4)
    expected = plain.weight - plain.weight.mean(1, keepdim=True) if factorization in CENTERED else plain.weight
    torch.testing.assert_close(layer.weight, expected)
    assert torch.equal(layer.bias, plain.bias)
    assert [id(p) for p in layer.parameters()] == objects


def test_initializers_of_torch_on_the_direction() -> None:
    layer = make("Conv2d")
    for initializer in (nn.init.xavier_normal_, nn.init.orthogonal_, nn.init.ones_):
        initializer(layer.v)
        torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), layer.g.flatten())
    nn.init.zeros_(layer.v)
    layer(batch("Conv2d")).sum().backward()
    assert layer.v.grad.isfinite().all()
    assert layer.g.grad.isfinite().all()


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(factorization: str, dtype: torch.dtype) -> None:
    layer = make("Conv2d", factorization)
    expected = layer.eval()(batch("Conv2d"))
    vectors = [None if x is None else x.clone() for x in (layer.left, layer.right)]
    layer.to(dtype)
    y = layer(batch("Conv2d").to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    for before, now in zip(vectors, (layer.left, layer.right), strict=True):
        assert (now is None) == (before is None)
        assert now is None or torch.equal(now, before)
    built = make("Conv2d", factorization, dtype=dtype)
    assert built.left is None or built.left.dtype == torch.float32
    built(batch("Conv2d").to(dtype)).sum().backward()
    assert built.v.grad.dtype == built.g.grad.dtype == dtype
    assert layer.double().left is None or layer.left.dtype == torch.float64


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_empty_unbatched_and_channels_last(factorization: str) -> None:
    layer = make("Conv2d", factorization).eval()
    x = batch("Conv2d")
    y = layer(x)
    assert layer(x[:0]).shape == (0, *y.shape[1:])
    torch.testing.assert_close(layer(x[0]), y[0])
    torch.testing.assert_close(layer(x.transpose(2, 3).contiguous().transpose(2, 3)), y)
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), y)


def test_spectral_norm_iterates_in_training_only_and_survives_two_forwards() -> None:
    layer = make("Linear", "spectral_norm")
    left = layer.left.clone()
    layer.eval()(batch("Linear"))
    assert layer.weight.shape == (4, 5)
    assert torch.equal(layer.left, left)
    evaluated = layer(batch("Linear"))
    layer.train()
    loss = (layer(batch("Linear", 1)) - layer(batch("Linear", 2))).square().sum() + evaluated.sum()
    assert not torch.equal(layer.left, left)
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer.left.clone()
        layer(batch("Linear"))
    assert (layer.left - before).abs().max() < 1e-2
    assert layer.left.dtype == torch.float32


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_gradients_reach_input_factors_and_bias(factorization: str) -> None:
    layer = make("Conv2d-circular", factorization).double().eval()
    x = batch("Conv2d-circular").double().requires_grad_()

    def call(x: Tensor, v: Tensor, g: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"v": v, "g": g, "bias": bias}, (x,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(call, (x, layer.v, layer.g, layer.bias))


def test_optimizers_go_on_after_loading() -> None:
    def step(layer: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        layer(batch("Linear", seed)).square().sum().backward()
        optimizer.step()

    layer, other = make("Linear"), make("Linear")
    optimizer, resumed = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (layer, other))
    for seed in range(3):
        step(layer, optimizer, seed)
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(layer, optimizer, seed)
        step(other, resumed, seed)
    assert same(layer.state_dict(), other.state_dict())


def test_on_the_meta_device() -> None:
    for factorization in FACTORIZATIONS:
        layer = make("Conv2d", factorization, device="meta")
        assert layer(batch("Conv2d").to("meta")).is_meta
        layer.to_empty(device="cpu").reset_parameters()
        assert layer(batch("Conv2d")).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_compiles_in_one_graph(factorization: str) -> None:
    layer = make("Linear", factorization)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        outputs = compiled(batch("Linear", seed)), twin(batch("Linear", seed))
        torch.testing.assert_close(*outputs)
        for y in outputs:
            y.square().sum().backward()
    torch.testing.assert_close(layer.v.grad, twin.v.grad)
    torch.testing.assert_close(layer.g.grad, twin.g.grad)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer)
