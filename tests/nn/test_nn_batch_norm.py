"""The layers: torch's in every respect that torch has, and the switches that it has not."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchlab.nn as ours

SHAPES = {"BatchNorm1d": (6, 4), "BatchNorm2d": (6, 4, 3, 3), "BatchNorm3d": (6, 4, 2, 3, 3)}
NAMES = list(SHAPES)


def make(name: str, **options: Any) -> Any:
    return getattr(ours, name)(4, **options)


def batch(name: str, seed: int = 0) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed)) * 2 + 1


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.named_buffers()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_trains_and_evaluates_as_torch(name: str, momentum: float | None, affine: bool, track: bool) -> None:
    options = {"eps": 1e-3, "momentum": momentum, "affine": affine, "track_running_stats": track}
    mine, theirs = make(name, **options), getattr(nn, name)(4, **options)
    assert isinstance(mine, getattr(nn, name))
    for seed in range(3):
        torch.testing.assert_close(mine(batch(name, seed)), theirs(batch(name, seed)))
    mine.eval()
    theirs.eval()
    torch.testing.assert_close(mine(batch(name)), theirs(batch(name)))
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_load_strictly_both_ways(name: str) -> None:
    mine, theirs = make(name), getattr(nn, name)(4)
    mine(batch(name))
    theirs.load_state_dict(mine.state_dict(), strict=True)
    mine.eval()
    theirs.eval()
    torch.testing.assert_close(theirs(batch(name)), mine(batch(name)))
    other = make(name)
    other.load_state_dict(theirs.state_dict(), strict=True)
    assert same(other.state_dict(), mine.state_dict())
    old = {key: value for key, value in theirs.state_dict().items() if key != "num_batches_tracked"}
    old = type(theirs.state_dict())(old)  # a checkpoint from before the counter existed
    other.load_state_dict(old, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name: str) -> None:
    layer = make(name, activation="relu", nonfinite="skip")
    layer.statistics, layer.update_statistics = "batch", False
    layer(batch(name))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert repr(other) == repr(layer)
        assert same(other.state_dict(), layer.state_dict())
        assert torch.equal(other(batch(name)), layer(batch(name)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("statistics", ["auto", "batch", "running"])
def test_the_two_switches_are_independent(statistics: str, update: bool, training: bool) -> None:
    layer, plain = ours.BatchNorm1d(4), nn.BatchNorm1d(4)
    for one in (layer, plain):
        one.running_mean.fill_(0.5)
        one.running_var.fill_(2.0)
    layer.statistics, layer.update_statistics = statistics, update
    layer.train(training)
    x = batch("BatchNorm1d")
    y = layer(x)
    used = {"auto": "batch" if training else "running"}.get(statistics, statistics)
    if used == "batch":
        expected = nn.functional.batch_norm(x, None, None, training=True)
    else:
        expected = nn.functional.batch_norm(x, torch.full((4,), 0.5), torch.full((4,), 2.0))
    torch.testing.assert_close(y, expected)
    if training and update:
        plain(x)  # torch's update
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)


def test_switches_show_in_repr_only_when_changed() -> None:
    layer = ours.BatchNorm2d(3)
    assert repr(layer) == repr(nn.BatchNorm2d(3))
    layer.statistics, layer.update_statistics = "running", False
    assert "statistics='running', update_statistics=False" in repr(layer)
    assert "activation='silu'" in repr(ours.BatchNorm1d(3, activation="silu"))


def test_a_frozen_layer_survives_train() -> None:
    model = nn.Sequential(nn.Linear(4, 4), ours.BatchNorm1d(4))
    model(batch("BatchNorm1d"))
    expected = model.eval()(batch("BatchNorm1d"))
    model[1].statistics, model[1].update_statistics = "running", False
    model.train()
    before = buffers(model)
    for seed in range(3):
        model(batch("BatchNorm1d", seed) * 100)
    assert same(before, buffers(model))
    torch.testing.assert_close(model(batch("BatchNorm1d")), expected, rtol=0, atol=0)


def test_bias_can_be_left_out_as_in_torch() -> None:
    mine, theirs = ours.BatchNorm1d(4, bias=False), nn.BatchNorm1d(4, bias=False)
    assert mine.bias is None
    assert repr(mine) == repr(theirs)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    torch.testing.assert_close(mine(batch("BatchNorm1d")), theirs(batch("BatchNorm1d")))


def test_bad_switch_values_are_refused_and_change_nothing() -> None:
    layer = ours.BatchNorm1d(3)
    with pytest.raises(ValueError, match="statistics is 'frozen'; allowed are 'auto', 'batch', 'running'"):
        layer.statistics = "frozen"
    assert layer.statistics == "auto"
    with pytest.raises(ValueError, match="track_running_stats=False"):
        ours.BatchNorm1d(3, track_running_stats=False).statistics = "running"
    for options in ({"activation": "gelu"}, {"nonfinite": "no"}, {"momentum": 2.0}):
        with pytest.raises(ValueError, match=r"allowed|momentum"):
            ours.BatchNorm1d(3, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_stay_float32_in_half_precision(dtype: torch.dtype) -> None:
    for layer in (
        ours.BatchNorm1d(2).to(dtype),
        ours.BatchNorm1d(2, dtype=dtype),
        nn.Sequential(ours.BatchNorm1d(2)).to(dtype)[0],
    ):
        assert layer.weight.dtype == dtype
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
        assert layer(torch.randn(4, 2, dtype=dtype)).dtype == dtype
    layer = ours.BatchNorm1d(1, momentum=1e-3)
    layer.running_mean.fill_(1 / 3)
    layer.bfloat16()
    assert layer.running_mean.item() == pytest.approx(1 / 3, rel=1e-7)  # not rounded on the way


def test_small_momentum_does_not_stop_in_bfloat16() -> None:
    layer = ours.BatchNorm1d(1, momentum=1e-3).bfloat16()
    x = torch.tensor([[0.0], [2.0]], dtype=torch.bfloat16)
    for _ in range(4000):
        layer(x)
    assert layer.running_mean.item() == pytest.approx(1 - (1 - 1e-3) ** 4000, abs=1e-4)


def test_float64_and_moves_keep_buffers_wide() -> None:
    layer = ours.BatchNorm1d(2).double()
    assert layer.running_mean.dtype == torch.float64
    assert layer.half().running_mean.dtype == torch.float64  # never narrowed
    assert ours.BatchNorm1d(2, device="meta").running_mean.is_meta


@pytest.mark.parametrize("name", NAMES)
def test_evaluates_a_batch_of_one(name: str) -> None:
    layer = make(name).eval()
    torch.testing.assert_close(layer(batch(name)[:1]), layer(batch(name))[:1])


def test_one_value_per_channel_in_training_is_explained() -> None:
    with pytest.raises(ValueError, match=r"one value per channel.*drop_last.*statistics='running'"):
        ours.BatchNorm1d(4)(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("name", "shape"), [("BatchNorm1d", (2, 4, 3, 3)), ("BatchNorm2d", (2, 4)), ("BatchNorm3d", (2, 4, 3))]
)
def test_wrong_number_of_dimensions(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make(name)(torch.zeros(shape))


def test_flag_of_torch_flipped_after_construction_still_works() -> None:
    mine, theirs = ours.BatchNorm1d(4), nn.BatchNorm1d(4)
    for layer in (mine, theirs):
        layer(batch("BatchNorm1d"))
        layer.track_running_stats = False
        layer(batch("BatchNorm1d", 1))
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    mine.eval()
    theirs.eval()
    torch.testing.assert_close(mine(batch("BatchNorm1d")), theirs(batch("BatchNorm1d")))


def test_mask_residual_and_activation_reach_the_function() -> None:
    layer = ours.BatchNorm1d(4, activation="relu", momentum=1.0)
    x, residual = torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    mask = torch.rand(5, 1, 6) < 0.6
    y = layer(x, residual=residual, mask=mask)
    frames = x.transpose(1, 2)[mask.squeeze(1)]
    expected = torch.relu(
        nn.functional.batch_norm(frames, None, None, training=True) + residual.transpose(1, 2)[mask.squeeze(1)]
    )
    torch.testing.assert_close(y.transpose(1, 2)[mask.squeeze(1)], expected)
    torch.testing.assert_close(layer.running_var, frames.var(0))


def test_nonfinite_batches_leave_no_trace_with_skip() -> None:
    clean, hit = (ours.BatchNorm1d(4, nonfinite="skip") for _ in range(2))
    for seed in range(4):
        x = batch("BatchNorm1d", seed)
        clean(x)
        hit(x)
        if seed == 1:
            poisoned = x.clone()
            poisoned[0] = math.inf
            hit(poisoned)
    torch.testing.assert_close(hit.running_mean, clean.running_mean)
    torch.testing.assert_close(hit.running_var, clean.running_var)


COMPILED = [
    {},
    {"momentum": None},
    {"nonfinite": "skip"},
    {"activation": "silu"},
    {"affine": False},
    {"track_running_stats": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compiles_without_a_graph_break(options: dict[str, Any], training: bool) -> None:
    torch._dynamo.reset()
    eager = ours.BatchNorm2d(4, **options).train(training)
    layer = copy.deepcopy(eager)
    # aot_eager traces forward and backward as inductor does, without needing a compiler for what follows.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        results = []
        for function in (eager, compiled):
            x = batch("BatchNorm2d", seed).requires_grad_()
            y = function(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad))
        torch.testing.assert_close(results[0], results[1])
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)


@pytest.mark.slow
def test_compiles_with_mask_and_switches() -> None:
    torch._dynamo.reset()
    layer = ours.BatchNorm1d(4)
    layer.statistics = "running"
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(5, 4, 6), torch.rand(5, 1, 6) < 0.6
    expected = copy.deepcopy(layer)
    torch.testing.assert_close(compiled(x, mask=mask), expected(x, mask=mask))
    torch.testing.assert_close(layer.running_var, expected.running_var)


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, batchlab; "
        "print([m for m in ('batchlab.lab', 'matplotlib', 'triton', 'rich', 'tyro', 'cattrs') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
