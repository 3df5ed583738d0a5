"""The natural layer: torch's function in whitened coordinates, which a refresh changes and the function does not."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchlab.nn as ours
from batchlab.nn import NaturalLinear
from batchlab.reference import natural as reference
from tests.whitening_by_hand import correlated, loop_covariance


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(rows: int = 40, features: int = 5, seed: int = 0, mean: float = 3.0) -> Tensor:
    return correlated(rows, features, seed=seed, mean=mean)


def make(*args: Any, dtype: torch.dtype = torch.float64, **options: Any) -> NaturalLinear:
    return NaturalLinear(*(args or (5, 3)), dtype=dtype, **options)


def refreshed(x: Tensor, **options: Any) -> NaturalLinear:
    layer = make(x.shape[-1], 3, dtype=x.dtype, **options)
    layer(x)
    assert layer.refresh()
    return layer


def numbers(layer: NaturalLinear) -> tuple[np.ndarray, ...]:
    u, c, v = (t.detach().double().numpy() for t in (layer.whitening, layer.center, layer.v))
    return u, c, v, np.zeros(len(v)) if layer.d is None else layer.d.detach().double().numpy()


def inverse_root(sigma: np.ndarray, eps: float) -> np.ndarray:
    """(Σ + eps I)^(-1/2) by Newton's iteration for the matrix root (Denman & Beavers), without eigenvalues."""
    a = sigma + eps * np.eye(len(sigma))
    y, z = a, np.eye(len(a))
    for _ in range(60):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return z


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_is_torchs(bias: bool) -> None:
    torch.manual_seed(1)
    plain = nn.Linear(5, 3, bias)
    torch.manual_seed(1)
    layer = NaturalLinear(5, 3, bias)
    x = inputs().float()
    assert torch.equal(layer(x), plain(x))
    assert repr(layer) == f"Natural{plain!r}"
    assert [name for name, _ in layer.named_parameters()] == (["v", "d"] if bias else ["v"])
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, plain.weight)
    assert (layer.bias is None) is not bias
    layer.refresh()
    layer.reset_parameters()
    assert torch.equal(layer.whitening, torch.eye(5))
    assert not layer.center.any()
    assert repr(make(eps=0.1, momentum=None)).endswith("bias=True, eps=0.1, momentum=None)")


@pytest.mark.parametrize("bias", [True, False])
def test_coordinates_are_those_of_a_hand_computation(bias: bool) -> None:
    x = inputs()
    layer = refreshed(x, bias=bias, eps=0.01)
    mean, sigma = loop_covariance(x.numpy())
    if not bias:
        sigma, mean = sigma + np.outer(mean, mean), np.zeros(5)
    u, c, v, d = numbers(layer)
    np.testing.assert_allclose(c, mean, rtol=1e-13)
    np.testing.assert_allclose(u, inverse_root(sigma, 0.01), rtol=1e-9, atol=1e-11)
    y = np.array([[sum(v[o] * (u @ (row - c))) + d[o] for o in range(3)] for row in x.numpy()])
    np.testing.assert_allclose(layer(x).detach().numpy(), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), reference.respond(x, layer.v, layer.d, layer.whitening, layer.center))


def test_whitened_inputs_have_covariance_one() -> None:
    x = inputs(200)
    layer = refreshed(x, eps=1e-10)
    whitened = (x - layer.center) @ layer.whitening.mT
    np.testing.assert_allclose(np.cov(whitened.numpy().T, bias=True), np.eye(5), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_refresh_does_not_change_the_function(dtype: torch.dtype, scale: float, bias: bool) -> None:
    x = (inputs(60, mean=0.0) * torch.tensor([scale, 1, 1, 1 / scale, 1]) + 2).to(dtype)
    layer = make(dtype=dtype, bias=bias)
    for seed in range(3):
        before = layer(x).double()
        weight, old = layer.weight.double(), layer.v.clone()
        assert layer.refresh()
        assert not torch.equal(old, layer.v)
        with torch.no_grad():
            condition = float(torch.linalg.cond(layer.whitening.double()))
            reach = float((layer.v.double().norm() * 5**0.5) + before.abs().max())
        # Two roundings: of z = U (x - c), in float32 or wider, grows with the condition; of V and d does not.
        wide = torch.finfo(layer.whitening.dtype).eps
        bound = (16 * condition * wide + 4 * torch.finfo(dtype).eps) * reach
        assert float((layer(x).double() - before).detach().abs().max()) <= bound
        assert condition < 4e3 or dtype == torch.float64
        if dtype == torch.float64:
            torch.testing.assert_close(layer.weight, weight, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            layer.v.add_(torch.randn_like(layer.v) * 0.1)
        x = x.flip(0) * (1.5 + seed) + seed


@pytest.mark.parametrize("bias", [True, False])
def test_a_step_is_preconditioned_by_the_inverse_covariance(bias: bool) -> None:
    x, target, rate, eps = inputs(30), torch.randn(30, 3, dtype=torch.float64), 0.3, 0.01
    layer = refreshed(x, bias=bias, eps=eps)
    plain = layer.merged()
    w = plain.weight.detach().numpy()
    b = np.zeros(3) if plain.bias is None else plain.bias.detach().numpy()
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    (layer(x) - target).square().sum().mul(0.5).backward()
    optimizer.step()
    mean, sigma = loop_covariance(x.numpy())
    if not bias:
        sigma, mean = sigma + np.outer(mean, mean), np.zeros(5)
    gradient_y = x.numpy() @ w.T + b - target.numpy()
    centered = np.zeros((3, 5))
    for g, row in zip(gradient_y, x.numpy(), strict=True):
        centered += np.outer(g, row - mean)
    new_w = w - rate * centered @ np.linalg.inv(sigma + eps * np.eye(5))
    after = layer.merged()
    np.testing.assert_allclose(after.weight.detach().numpy(), new_w, rtol=1e-9, atol=1e-9)
    if bias:
        new_b = b + w @ mean - rate * gradient_y.sum(0) - new_w @ mean
        np.testing.assert_allclose(after.bias.detach().numpy(), new_b, rtol=1e-9, atol=1e-9)


def awkward(kind: str) -> Tensor:
    x = inputs(30, 6, mean=0.0)
    if kind == "constant":
        x[:, 2] = 7
    elif kind == "dead":
        x[:, :4] = 0
    elif kind == "all dead":
        x.zero_()
    elif kind == "duplicated":
        x[:, 3] = x[:, 1]
    elif kind == "fewer samples than features":
        x = x[:2]
    elif kind == "huge":
        x *= 1e6
    elif kind == "tiny":
        x *= 1e-12
    elif kind == "large mean":
        x += 1e3
    return x


KINDS = ("constant", "dead", "all dead", "duplicated", "fewer samples than features", "huge", "tiny", "large mean")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_inputs_stay_finite_and_the_same(kind: str, dtype: torch.dtype) -> None:
    x = awkward(kind).to(dtype)
    layer = make(6, 3, dtype=dtype)
    before = layer(x).detach()
    layer.refresh()
    after = layer(x)
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}[dtype]
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance * float(before.abs().max()))
    after.square().sum().backward()
    assert all(bool(t.isfinite().all()) for t in (*layer.state_dict().values(), layer.v.grad, layer.d.grad))  # type: ignore[union-attr]


@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias: bool) -> None:
    x = inputs(6).requires_grad_()
    layer = refreshed(inputs(), bias=bias)
    torch.autograd.gradcheck(layer, (x,))
    torch.autograd.gradgradcheck(layer, (x,))
    layer(x).square().sum().backward()
    mine = [x.grad, layer.v.grad]
    weight, shift = layer.weight, layer.bias
    x.grad = layer.v.grad = None
    nn.functional.linear(x, weight, shift).square().sum().backward()  # through the effective weight
    for a, b in zip(mine, [x.grad, layer.v.grad], strict=True):
        torch.testing.assert_close(a, b)


def test_a_refresh_drops_gradients_and_refuses_what_does_not_fit() -> None:
    layer = make()
    layer(inputs()).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(3,\) where the layer's own is \(3, 5\)"):
        layer.refresh([(torch.zeros(3), None)])
    assert layer.v.grad is not None
    assert layer.refresh()
    assert layer.v.grad is None
    half = make(dtype=torch.float32).half()
    with torch.no_grad():
        half.v.fill_(6e4)
    half(1e3 * inputs().half())
    state = copy.deepcopy(half.state_dict())
    with pytest.raises(ValueError, match="does not hold; nothing was changed"):
        half.refresh()
    assert all(torch.equal(value, state[name]) for name, value in half.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_wide_statistics(dtype: torch.dtype) -> None:
    layer = refreshed(inputs().float())
    layer(inputs(seed=1).float())
    state = copy.deepcopy(layer.state_dict())
    layer.to(dtype)
    assert layer.v.dtype == dtype
    for name in ("whitening", "center", "collected_count", "collected_mean", "collected_m2"):
        assert torch.equal(getattr(layer, name), state[name])
        assert getattr(layer, name).dtype == state[name].dtype
    assert layer.double().whitening.dtype == torch.float64
    x = inputs().to(dtype)
    y = layer.to(dtype)(x)
    assert y.dtype == dtype
    expected = layer.double().eval()(x.double())
    assert float((y.double() - expected).detach().abs().max()) < 8 * torch.finfo(dtype).eps * float(
        expected.detach().abs().max()
    )


def test_autocast_leaves_the_whitening_alone() -> None:
    x = inputs(64, mean=1e3).float()
    layer = refreshed(x)
    expected = layer.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.train()(x)
        torch.testing.assert_close(layer.weight, layer.merged().weight, rtol=1e-5, atol=1e-5)
    assert y.dtype == torch.bfloat16
    assert layer.collected_m2.dtype == torch.float64
    assert float((y.float() - expected).detach().abs().max()) < 0.02 * float(expected.detach().abs().max())


def test_from_a_stock_layer_and_back() -> None:
    plain = nn.Linear(5, 3, dtype=torch.float64).eval()
    plain.weight.requires_grad_(False)
    before = copy.deepcopy(plain)
    layer = NaturalLinear.from_module(plain, eps=0.1, momentum=None)
    assert layer.v is plain.weight
    assert layer.d is plain.bias
    assert not layer.training
    assert (layer.eps, layer.momentum) == (0.1, None)
    layer.train()(inputs())
    layer.refresh()
    back = layer.eval().merged()
    assert type(back) is nn.Linear
    assert repr(back) == repr(before)
    assert not back.weight.requires_grad
    assert back.bias.requires_grad
    assert not back.training
    torch.testing.assert_close(back(inputs()), before(inputs()), rtol=1e-10, atol=1e-10)
    for module in (NaturalLinear(5, 3), nn.Bilinear(2, 2, 2)):
        with pytest.raises(TypeError, match=r"needs a torch\.nn\.Linear"):
            NaturalLinear.from_module(module)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="weight is computed from v"):
        layer.weight = plain.weight


def test_state_dicts_of_stock_layers_and_its_own() -> None:
    layer, plain = refreshed(inputs()), nn.Linear(5, 3, dtype=torch.float64)
    net = nn.Sequential(layer)
    net.load_state_dict({f"0.{key}": value for key, value in plain.state_dict().items()}, strict=True)
    assert torch.equal(layer(inputs()), plain(inputs()))
    assert layer.collected_count == 40
    layer.refresh()
    plain.load_state_dict(layer.merged().state_dict(), strict=True)
    torch.testing.assert_close(plain(inputs()), layer(inputs()))
    twin = make()
    twin.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(twin(inputs()), layer(inputs()))
    with pytest.raises(RuntimeError, match="size mismatch for v"):
        make(4, 2).load_state_dict(nn.Linear(5, 2).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make(bias=False).load_state_dict(plain.state_dict())


def test_copies_and_resuming_in_the_middle_of_a_collection_are_exact() -> None:
    layer = refreshed(inputs(), momentum=0.5)
    layer(inputs(seed=1))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = make(momentum=0.5)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        mine = copy.deepcopy(layer)
        for each in (mine, twin):
            each(inputs(seed=2))
            each.refresh()
        assert repr(twin) == repr(mine)
        for name, value in twin.state_dict().items():
            assert torch.equal(value, mine.state_dict()[name]), name


def test_inputs_without_strides_of_their_own_and_batches_of_one() -> None:
    layer = refreshed(inputs())
    wide = inputs(12, 10)
    x = wide.view(3, 4, 10).transpose(0, 1)[..., ::2]
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    assert layer.eval()(x[:, :0]).shape == (4, 0, 3)
    torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0])


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"eps": math.nan}, {"momentum": 0.0}, {"momentum": 1.5}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        make(**options)
    with pytest.raises(ValueError, match="in_features is 0"):
        make(0, 3)


def test_in_a_chain_with_batchwise_dropout_it_computes_all_features() -> None:
    chain = ours.SubmatrixSequential(ours.BatchwiseDropout(0.4), refreshed(inputs()), nn.ReLU(), mode="submatrix")
    x = inputs()
    y = chain(x)
    kept = torch.zeros(5, dtype=torch.bool).index_fill(0, chain[0].kept, True)
    torch.testing.assert_close(y, chain[1](x * kept * 5 / 3).relu())
    assert chain[1].collected_count == 80


@pytest.mark.slow
def test_compiled_is_eager() -> None:
    eager = refreshed(inputs())
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = inputs(seed=seed)
        for layer, call in ((eager, eager), (compiled, run)):
            layer.zero_grad()
            call(x).square().sum().backward()
            layer.refresh() if seed else None
        torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    torch.testing.assert_close(run(x), eager(x))
