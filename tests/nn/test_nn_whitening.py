"""The whitening layers: state, switches, copies, dtypes, compilation."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchlab.nn as ours
from batchlab.functional import whitening_matrix
from tests.whitening_by_hand import correlated

SHAPES = {"Whitening1d": (9, 4), "Whitening2d": (6, 4, 3, 3), "Whitening3d": (6, 4, 2, 3, 3)}
NAMES = list(SHAPES)
METHODS = ("zca", "cholesky", "newton")


def batch(name: str = "Whitening1d", seed: int = 0) -> Tensor:
    return correlated(*SHAPES[name], seed=seed, mean=1.0).float()


def make(name: str = "Whitening1d", **options: Any) -> Any:
    return getattr(ours, name)(4, **options)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_trains_and_evaluates(name: str, method: str) -> None:
    layer = make(name, method=method, momentum=None, eps=1e-9, iterations=30)
    for seed in range(5):
        y = layer(batch(name, seed))
        rows = y.detach().movedim(1, -1).reshape(-1, 4)
        torch.testing.assert_close(torch.cov(rows.T, correction=0), torch.eye(4), atol=1e-3, rtol=0)
    layer.eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert before["num_batches_tracked"] == 5
    everything = torch.cat([batch(name, seed) for seed in range(5)])
    whole = layer(everything)
    torch.testing.assert_close(layer(everything[:1]), whole[:1])
    rows = whole.detach().movedim(1, -1).reshape(-1, 4)
    assert (rows.var(0) - 1).abs().max() < 0.7
    assert same(before, layer.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_one_follow_torchs_batch_norm_through_training(method: str) -> None:
    torch.manual_seed(0)
    mine, theirs = make("Whitening2d", method=method, group_size=1), nn.BatchNorm2d(4)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (mine, theirs)]
    for seed in range(4):
        x, target = batch("Whitening2d", seed), torch.randn(6, 4, 3, 3)
        for layer, optimizer in zip((mine, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(layer(x), target).backward()
            optimizer.step()
    state, expected = mine.state_dict(), theirs.state_dict()
    for key in ("weight", "bias", "running_mean", "num_batches_tracked"):
        torch.testing.assert_close(state[key], expected[key])
    torch.testing.assert_close(state["running_covariance"].flatten().float(), expected["running_var"])
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


def test_before_training_evaluation_is_the_identity_but_for_eps() -> None:
    x = batch()
    for method in METHODS:
        torch.testing.assert_close(make(method=method, eps=1e-9, iterations=15).eval()(x), x)


@pytest.mark.parametrize("options", [{}, {"coloring": True}, {"affine": False}, {"group_size": 2, "coloring": True}])
def test_state_is_what_the_docstring_says(options: dict[str, Any]) -> None:
    layer = make(**options)
    size = options.get("group_size", 4)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {
        "running_mean": (4,),
        "running_covariance": (4 // size, size, size),
        "num_batches_tracked": (),
    }
    if options.get("affine", True):
        expected["weight"] = (4 // size, size, size) if options.get("coloring") else (4,)
        expected["bias"] = (4,)
    assert shapes == expected
    other = make(**options)
    layer(batch())
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other.eval()(batch()), layer.eval()(batch()))
    without = make(**options, track_running_stats=False)
    assert not dict(without.named_buffers())
    assert torch.equal(without.eval()(batch()), make(**options)(batch()))


def test_coloring_starts_at_the_identity_and_is_a_linear_map_of_the_whitened_input() -> None:
    torch.manual_seed(0)
    x = batch()
    layer, plain = make(group_size=2, coloring=True), make(group_size=2, affine=False)
    torch.testing.assert_close(layer(x), plain(x))
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    expected = plain(x) @ torch.block_diag(*layer.weight).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    (grad,) = torch.autograd.grad(expected.square().sum(), layer.weight)
    torch.testing.assert_close(layer.weight.grad, grad)
    layer.reset_parameters()
    assert torch.equal(layer.weight.detach(), torch.eye(2).repeat(2, 1, 1))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("statistics", ["auto", "batch", "running"])
def test_the_two_switches_are_independent(statistics: str, update: bool, training: bool) -> None:
    layer, plain = make(), make()
    for one in (layer, plain):
        one(batch(seed=7) * 3)
    frozen = copy.deepcopy(plain).eval()
    layer.statistics, layer.update_statistics = statistics, update
    layer.train(training)
    x = batch()
    used = {"auto": "batch" if training else "running"}.get(statistics, statistics)
    expected = copy.deepcopy(plain)(x) if used == "batch" else frozen(x)
    torch.testing.assert_close(layer(x), expected)
    if training and update:
        plain(x)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_repr(name: str) -> None:
    layer = make(name, method="newton", iterations=7, group_size=2, coloring=True)
    layer.statistics, layer.update_statistics = "batch", False
    layer(batch(name))
    assert repr(layer) == (
        f"{name}(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, method='newton', iterations=7, "
        "group_size=2, coloring=True, statistics='batch', update_statistics=False)"
    )
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert repr(other) == repr(layer)
        assert same(other.state_dict(), layer.state_dict())
        assert torch.equal(other(batch(name)), layer(batch(name)))


def test_training_resumes_to_the_last_bit() -> None:
    layer = make(momentum=None)
    layer(batch())
    other = make(momentum=None)
    other.load_state_dict(layer.state_dict())
    for one in (layer, other):
        one(batch(seed=1))
    assert same(layer.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_keep_their_digits_in_any_dtype(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    layer = make()
    layer(batch())
    mean, sigma = layer.running_mean.clone(), layer.running_covariance.clone()
    for one in (layer.to(dtype), make(dtype=dtype)):
        assert one.weight.dtype == one.bias.dtype == dtype
        assert one.running_mean.dtype == wide
        assert one.running_covariance.dtype == torch.float64
        one.train()
        assert one(batch().to(dtype)).dtype == dtype
        assert one.eval()(batch().to(dtype)).dtype == dtype
    layer = make()
    layer(batch())
    layer.to(dtype).float()
    assert torch.equal(layer.running_mean.float(), mean)
    assert torch.equal(layer.running_covariance, sigma)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group_size is 3.*the 8 channels.*nearest that do: 2, 4 \(None"):
        ours.Whitening1d(8, group_size=3)
    with pytest.raises(ValueError, match="coloring=True learns a matrix and affine=False"):
        make(coloring=True, affine=False)
    for options in ({"method": "pca"}, {"eps": 0.0}, {"iterations": -1}, {"momentum": 2.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make(**options)
    for name, allowed in (("Whitening1d", "2D or 3D"), ("Whitening2d", "4D"), ("Whitening3d", "5D")):
        with pytest.raises(ValueError, match=f"expected {allowed} input \\(got 6D input\\)"):
            make(name)(torch.zeros(2, 4, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="input has 5 channels in dimension 1, and this layer has num_features=4"):
        make()(torch.zeros(3, 5))
    layer = make()
    with pytest.raises(ValueError, match="one value per channel"):
        layer(torch.zeros(1, 4))
    assert layer.num_batches_tracked == 0
    assert layer(torch.zeros(0, 4)).shape == (0, 4)
    assert layer.num_batches_tracked == 0
    with pytest.raises(ValueError, match="statistics is 'frozen'; allowed are 'auto', 'batch', 'running'"):
        layer.statistics = "frozen"
    with pytest.raises(ValueError, match="track_running_stats=False"):
        make(track_running_stats=False).statistics = "running"


def test_meta_device_and_parameters_materialize() -> None:
    layer = make(device="meta", group_size=2)
    assert layer(torch.empty(5, 4, device="meta")).shape == (5, 4)
    layer.to_empty(device="cpu").reset_parameters()
    assert same(layer.state_dict(), make(group_size=2).state_dict())


def test_a_network_learns_through_groups_that_can_never_have_full_rank() -> None:
    torch.manual_seed(0)
    x = correlated(64, 4).float()
    target = x[:, :1] - x[:, 1:2]
    whitening = ours.Whitening1d(16, group_size=8)  # eight features of four inputs
    model = nn.Sequential(nn.Linear(4, 16), whitening, nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert model.eval()(x).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiles_to_one_graph(method: str) -> None:
    options: dict[str, Any] = {"method": method, "group_size": 2, "momentum": None, "coloring": True}
    eager, traced = make("Whitening2d", **options), make("Whitening2d", **options)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        inputs = [batch("Whitening2d", seed).requires_grad_() for _ in range(2)]
        for layer, x in zip((eager, compiled), inputs, strict=True):
            layer(x).pow(3).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(traced.state_dict(), eager.state_dict())
    torch.testing.assert_close(traced.weight.grad, eager.weight.grad)
    x = batch("Whitening2d")
    traced.eval()
    torch.testing.assert_close(compiled(x), eager.eval()(x))
    matrix = whitening_matrix(traced.running_covariance, method=method)
    assert matrix.shape == (2, 2, 2)
