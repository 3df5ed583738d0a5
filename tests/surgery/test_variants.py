"""Recalibrating and folding the relatives of batch norm, which in evaluation are s·x + t per channel."""

import pytest
import torch
from torch import nn

import batchlab
from batchlab.surgery import fold, recalibrate

KINDS = (
    "GhostBatchNorm",
    "BatchRenorm",
    "NoisyBatchNorm",
    "PopulationBatchNorm",
    "MeanOnlyBatchNorm",
    "VarianceOnlyBatchNorm",
)
LINEAR = {1: nn.Linear, 2: nn.Conv2d, 3: nn.Conv3d}


def made(kind: str, dimensions: int, features: int, **options: bool) -> nn.Module:
    layer: nn.Module = getattr(batchlab.nn, f"{kind}{dimensions}d")(features, **options)
    return layer


def filled(layer: nn.Module) -> nn.Module:
    """Everything that evaluation reads, at random."""
    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        if name in ("weight", "bias", "running_mean", "running_var"):
            value.data.copy_(torch.rand_like(value) + 0.3)
    return layer


def by_hand(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Evaluation channel by channel, in numbers."""
    y = torch.empty_like(x)
    state = layer.state_dict()
    for channel in range(x.shape[1]):
        value = x[:, channel]
        if "running_mean" in state:
            value = value - state["running_mean"][channel]
        if "running_var" in state:
            value = value / (state["running_var"][channel] + layer.eps) ** 0.5
        if "weight" in state:
            value = value * state["weight"][channel]
        y[:, channel] = value + state["bias"][channel]
    return y


@pytest.mark.parametrize("where", ["behind", "in front"])
@pytest.mark.parametrize("dimensions", LINEAR)
@pytest.mark.parametrize("kind", KINDS)
def test_relatives_fold_exactly(kind: str, dimensions: int, where: str) -> None:
    torch.manual_seed(0)
    size = (2, 4, *[5] * (dimensions if dimensions > 1 else 0))
    layer = LINEAR[dimensions](4, 4) if dimensions == 1 else LINEAR[dimensions](4, 4, 3, padding=1)
    norm = filled(made(kind, dimensions, 4))
    order = [layer, norm] if where == "behind" else [norm, layer]
    model = nn.Sequential(*order).double().eval()
    x = torch.randn(size, dtype=torch.float64)
    expected = by_hand(model[1], model[0](x)) if where == "behind" else model[1](by_hand(model[0], x))
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)
    folded, report = fold(model, x)
    assert [entry.norm for entry in report.folded] == ["1" if where == "behind" else "0"]
    assert not report.refused
    assert not any(kind in type(module).__name__ for module in folded.modules())
    assert torch.allclose(folded(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_relatives_without_statistics_are_refused(kind: str) -> None:
    if kind in ("PopulationBatchNorm", "BatchRenorm"):
        with pytest.raises(ValueError, match="track_running_stats=False"):
            made(kind, 1, 4, track_running_stats=False)
        return
    model = nn.Sequential(nn.Linear(4, 4), made(kind, 1, 4, track_running_stats=False))
    _, report = fold(model, torch.randn(6, 4))
    assert "has no running statistics" in report.refused[0].reason
    with pytest.warns(UserWarning, match="changed nothing"):
        recalibrate(model, [torch.randn(6, 4)])


@pytest.mark.parametrize("estimator", ["pooled", "algorithm2"])
@pytest.mark.parametrize("kind", KINDS)
def test_relatives_are_recalibrated(kind: str, estimator: str) -> None:
    torch.manual_seed(0)
    norm = made(kind, 1, 3)
    batches = [3 + 2 * torch.randn(count, 3) for count in (5, 8, 2)]
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    recalibrate(nn.Sequential(nn.Dropout(0.5), norm), batches, estimator=estimator)
    rows = torch.cat(batches).double()
    within = sum(len(b) * b.double().var(0) for b in batches) / len(rows)
    expected = {"running_mean": rows.mean(0), "running_var": rows.var(0) if estimator == "pooled" else within}
    for name, value in norm.state_dict().items():
        if name in expected:
            assert torch.allclose(value.double(), expected[name], rtol=1e-5)
        else:
            assert torch.equal(value, before[name]), name


def test_what_is_behind_a_recalibrated_centering_sees_centred_inputs() -> None:
    first, second = made("MeanOnlyBatchNorm", 1, 2), made("VarianceOnlyBatchNorm", 1, 2)
    model = nn.Sequential(first, second)
    batches = [torch.tensor([[0.0, 1.0], [2.0, 5.0]]), torch.tensor([[10.0, 0.0], [16.0, 0.0]])]
    recalibrate(model, batches)
    assert first.state_dict()["running_mean"].tolist() == [7.0, 1.5]
    # Each batch centred by its own mean: ±1, ±3 and ±2, 0.
    assert second.state_dict()["running_var"].tolist() == pytest.approx([20 / 3, 8 / 3])


def test_one_frozen_and_one_that_is_not_finite() -> None:
    norm = made("VarianceOnlyBatchNorm", 1, 2)
    with pytest.raises(ValueError, match="non-finite statistics in 1 of 2 channels"):
        recalibrate(norm, [torch.tensor([[1.0, float("nan")], [2.0, 3.0]])])
    assert norm.state_dict()["running_var"].tolist() == [1.0, 1.0]
    norm.update_statistics = False
    with pytest.warns(UserWarning, match="changed nothing"):
        recalibrate(norm, [torch.randn(4, 2)])
