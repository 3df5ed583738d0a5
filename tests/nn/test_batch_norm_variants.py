"""The contract of the layers that are not batch normalization in training alone: torch's state, modes, dtypes."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchlab.nn as ours

SHAPES = {1: (6, 4), 2: (6, 4, 3, 3), 3: (6, 4, 2, 3, 3)}
# Each mechanism with settings under which it does what distinguishes it from the first batch on.
OPTIONS: dict[str, dict[str, Any]] = {
    "BatchRenorm": {"warmup_steps": 1, "r_max_steps": 3, "d_max_steps": 4, "momentum": 0.1},
    "GhostBatchNorm": {"group_size": 4},
    "NoisyBatchNorm": {},
    "PopulationBatchNorm": {"refresh_every": 4},
}
NAMES = [f"{mechanism}{dimensions}d" for mechanism in OPTIONS for dimensions in SHAPES]
FLAT = [f"{mechanism}1d" for mechanism in OPTIONS]
# Its statistics move every few batches, not in each: some of the contract means something else there.
POPULATION = "PopulationBatchNorm"
AT_ONCE = [name for name in FLAT if not name.startswith(POPULATION)]


def make(name: str, **options: Any) -> Any:
    return getattr(ours, name)(4, **OPTIONS[name[:-2]] | options)


def batch(name: str, seed: int = 0) -> Tensor:
    return torch.randn(SHAPES[int(name[-2])], generator=torch.Generator().manual_seed(seed)) * 2 + 1


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output, the same for the same layer: noise is drawn from one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return layer(x)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_load_strictly_both_ways(name: str) -> None:
    mine, theirs = make(name), getattr(nn, f"BatchNorm{name[-2:]}")(4)
    assert isinstance(mine, type(theirs))
    assert [parameter for parameter, _ in mine.named_parameters()] == ["weight", "bias"]
    run(mine, batch(name))
    stock = {key: value for key, value in mine.state_dict().items() if not key.startswith("collected_")}
    assert name.startswith(POPULATION) or stock.keys() == mine.state_dict().keys()
    theirs.load_state_dict(stock, strict=True)
    mine.eval()
    theirs.eval()
    torch.testing.assert_close(theirs(batch(name)), mine(batch(name)))
    other = make(name)
    other.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(other.eval()(batch(name)), mine(batch(name)))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_batch_norm_for_a_batch_of_one_too(name: str) -> None:
    mine, theirs = make(name), getattr(nn, f"BatchNorm{name[-2:]}")(4).eval()
    run(mine, batch(name))
    mine.eval()
    theirs.load_state_dict(mine.state_dict(), strict=False)
    before = state(mine)
    torch.testing.assert_close(mine(batch(name, 1)), theirs(batch(name, 1)))
    torch.testing.assert_close(mine(batch(name, 1)[:1]), theirs(batch(name, 1)[:1]))
    assert same(state(mine), before)


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_resumes_bit_for_bit(name: str) -> None:
    layer = make(name)
    layer.update_statistics = True
    for seed in range(3):
        run(layer, batch(name, seed))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    resumed = make(name)
    resumed.load_state_dict(state(layer), strict=True)
    others = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False), resumed)
    for other in others:
        assert repr(other) == repr(layer)
    for seed in range(3, 9):
        y = run(layer, batch(name, seed))
        for other in others:
            assert torch.equal(run(other, batch(name, seed)), y)
            assert same(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize("name", FLAT)
def test_a_frozen_layer_survives_train(name: str) -> None:
    layer = make(name)
    run(layer, batch(name))
    expected = layer.eval()(batch(name, 1))
    layer.statistics, layer.update_statistics = "running", False
    layer.train()
    before = state(layer)
    if not name.startswith("Noisy"):
        torch.testing.assert_close(run(layer, batch(name, 1)), expected, rtol=0, atol=0)
    run(layer, 100 * batch(name, 2))
    assert same(state(layer), before)
    assert "statistics='running', update_statistics=False" in repr(layer)


@pytest.mark.parametrize("name", FLAT)
def test_statistics_pause_without_changing_the_output(name: str) -> None:
    layer, paused = make(name), make(name)
    for one in (layer, paused):
        run(one, batch(name))
    paused.update_statistics = False
    before = state(paused)
    assert torch.equal(run(paused, batch(name, 1)), run(layer, batch(name, 1)))
    assert same(state(paused), before)
    assert not same(state(layer), before)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_stay_float32_in_half_precision(name: str, dtype: torch.dtype) -> None:
    wide = make(name)
    run(wide, batch(name).to(dtype).float())
    for layer in (make(name).to(dtype), make(name, dtype=dtype)):
        assert layer.weight.dtype == dtype
        y = run(layer, batch(name).to(dtype))
        assert y.dtype == dtype
        for key, value in wide.named_buffers():
            found = dict(layer.named_buffers())[key]
            assert found.dtype == value.dtype
            torch.testing.assert_close(found, value)
        torch.testing.assert_close(y.float(), run(make(name), batch(name).to(dtype).float()), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", FLAT)
def test_float64_stays_and_every_tensor_honours_the_device(name: str) -> None:
    layer = make(name).double()
    run(layer, batch(name).double())
    floating = [buffer for buffer in layer.buffers() if buffer.is_floating_point()]
    assert {buffer.dtype for buffer in floating} == {torch.float64}
    assert layer.half().running_mean.dtype == torch.float64  # never narrowed
    on_meta = make(name, device="meta")
    assert all(tensor.is_meta for tensor in (*on_meta.buffers(), *on_meta.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_passes_through_and_counts_nothing(name: str) -> None:
    layer = make(name)
    run(layer, batch(name))
    before = state(layer)
    x = batch(name)[:0].requires_grad_()
    y = run(layer, x)
    assert y.shape == x.shape
    y.sum().backward()
    assert same(state(layer), before)
    fresh = make(name)
    before = state(fresh)
    run(fresh, x)
    assert same(state(fresh), before)


@pytest.mark.parametrize("name", FLAT)
def test_one_value_per_channel_in_training_is_explained(name: str) -> None:
    layer = make(name)
    before = state(layer)
    with pytest.raises(ValueError, match="one value per channel"):
        layer(torch.zeros(1, 4))
    assert same(state(layer), before)


@pytest.mark.parametrize("name", NAMES)
def test_memory_layout_does_not_matter(name: str) -> None:
    x = batch(name)
    plain, other = make(name), make(name)
    spread = torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    assert not spread.is_contiguous()
    torch.testing.assert_close(run(other, spread), run(plain, x))
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if memory_format is not None:
        y = run(make(name), x.contiguous(memory_format=memory_format))
        torch.testing.assert_close(y, run(make(name), x))
        assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(other.running_var, plain.running_var)


@pytest.mark.parametrize("name", FLAT)
def test_large_means_cost_no_digits(name: str) -> None:
    x = batch(name, 5) + 2e3  # mean/std 1e3
    silent = {"mean_range": 0.0, "std_range": 1.0, "mean_spread": 0.0, "std_spread": 0.0}  # seeds differ by dtype
    options = {"momentum": 1.0} | (silent if name.startswith("Noisy") else {})
    wide, narrow = make(name, **options).double(), make(name, **options)
    for _ in range(2):
        exact, y = run(wide, x.double()), run(narrow, x)
    stock = (nn.BatchNorm1d(4)(x).double() - nn.BatchNorm1d(4).double()(x.double())).detach()
    assert float((y.double() - exact).detach().abs().max()) <= 2 * float(stock.abs().max()) + 4e-6
    torch.testing.assert_close(narrow.running_var.double(), wide.running_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", AT_ONCE)
def test_without_affine_and_without_momentum(name: str) -> None:
    layer, plain = make(name, affine=False, momentum=None), nn.BatchNorm1d(4, momentum=None)
    for seed in range(4):
        run(layer, batch(name, seed))
        plain(batch(name, seed))
    assert not list(layer.parameters())
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked.item() == 4


@pytest.mark.parametrize("name", AT_ONCE)
def test_nonfinite_batches_leave_no_trace_with_skip(name: str) -> None:
    layer = make(name, nonfinite="skip")
    run(layer, batch(name))
    before = state(layer)
    poisoned = batch(name, 1)
    poisoned[:, 0] = math.inf
    run(layer, poisoned)
    after = state(layer)
    assert torch.equal(after["running_mean"][0], before["running_mean"][0])
    assert not torch.equal(after["running_mean"][1:], before["running_mean"][1:])
    assert after["running_var"].isfinite().all()
    strict = make(name, nonfinite="raise")
    before = state(strict)
    with pytest.raises(ValueError, match=r"non-finite batch statistics in 1 of 4 channels \(0\)"):
        strict(poisoned)
    assert same(state(strict), before)


@pytest.mark.parametrize(("dimensions", "shape"), [(1, (2, 4, 3, 3)), (2, (2, 4)), (3, (2, 4, 3))])
@pytest.mark.parametrize("mechanism", OPTIONS)
def test_wrong_number_of_dimensions(mechanism: str, dimensions: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make(f"{mechanism}{dimensions}d")(torch.zeros(shape))


@pytest.mark.parametrize("name", FLAT)
def test_bad_options_are_refused(name: str) -> None:
    layer = make(name)
    with pytest.raises(ValueError, match="statistics is 'frozen'; allowed are 'auto', 'batch', 'running'"):
        layer.statistics = "frozen"
    for options in ({"nonfinite": "no"}, {"momentum": 2.0}):
        with pytest.raises(ValueError, match=r"allowed|momentum"):
            make(name, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{mechanism}2d" for mechanism in OPTIONS])
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    for training in (True, False):
        eager = make(name).train(training)
        layer = copy.deepcopy(eager)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for seed in range(3):
            results = []
            for function in (eager, compiled):
                x = batch(name, seed).requires_grad_()
                y = run(function, x)
                y.square().sum().backward()
                results.append((y.detach(), x.grad))
            torch.testing.assert_close(results[0], results[1])
        for key, value in eager.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value)
