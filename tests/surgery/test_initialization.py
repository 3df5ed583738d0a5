"""`initialize`: variances survive thirty layers, slopes and dropouts are found, and what is left is said."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from batchlab import nn as ours
from batchlab.surgery import InitializationEntry, initialize

DEPTH, WIDTH, NETS = 30, 512, 6

# How far log(variance) may move over the 30 layers. Each layer adds about k/n to its variance over random nets, n the
# width, k = E[f^4]/E[f^2]^2 - 1, which is at most 5 without dropout and 11 with p = 0.5: over all layers 0.29 and 0.64,
# with a mean of minus half of that. Averaged over 6 nets the standard deviation is 0.22 and 0.33, so 1.3 and 2.0 are
# more than four of them. A slope of 0.25 taken for 0, or the other way round, moves it by 30 log(1.0625) = 1.8,
# Xavier's or a forgotten dropout by 21.
TOLERANCE = {1.0: 1.3, 0.5: 2.0}


def chain(make: Callable[[], nn.Module], keep: float, channels: int | None) -> nn.Sequential:
    """Thirty layers with the same nonlinearity between any two; the last one is followed by it too."""
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        if keep < 1:
            layers.append(nn.Dropout(1 - keep))
        if channels is None:
            layers.append(nn.Linear(WIDTH, WIDTH))
        else:  # 3x3 over a map of four positions that is periodic: no borders
            layers.append(nn.Conv1d(channels, channels, 3, padding=1, padding_mode="circular", groups=4))
        layers.append(make())
    return nn.Sequential(*layers)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], float, int | None]] = {
    "relu": (nn.ReLU, 1.0, None),
    "prelu": (nn.PReLU, 1.0, None),
    "leaky": (lambda: nn.LeakyReLU(0.5), 1.0, None),
    "relu-dropout": (nn.ReLU, 0.5, None),
    "prelu-dropout": (nn.PReLU, 0.5, None),
    "relu-grouped": (nn.ReLU, 1.0, 256),
}


def mean_log_ratio(name: str, mode: str, scheme: str) -> float:
    make, keep, channels = NETWORKS[name]
    model = chain(make, keep, channels)
    logs = []
    for seed in range(NETS):
        torch.manual_seed(seed)
        initialize(model, scheme, mode=mode, distribution="uniform")
        x = torch.randn((16, WIDTH) if channels is None else (16, channels, 4), requires_grad=True)
        y = model[:-1](x)
        if mode == "forward":
            logs.append(math.log(y.square().mean().item() / x.square().mean().item()))
            continue
        gradient = torch.randn_like(y)
        out = model[-1](y)
        out.backward(gradient)
        assert x.grad is not None
        logs.append(math.log(x.grad.square().mean().item()))
    return sum(logs) / len(logs)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("name", NETWORKS)
def test_variance_survives_thirty_layers(name: str, mode: str) -> None:
    assert abs(mean_log_ratio(name, mode, "he")) < TOLERANCE[NETWORKS[name][1]]


def test_xavier_dies_where_he_lives() -> None:
    # The paper's 30-layer experiment in numbers: each of 29 rectifiers halves the variance.
    assert mean_log_ratio("relu", "forward", "xavier") == pytest.approx(-29 * math.log(2), abs=1.5)
    assert mean_log_ratio("relu", "backward", "xavier") == pytest.approx(-30 * math.log(2), abs=1.5)


def entries(model: nn.Module, *args: Any, **options: Any) -> dict[str, InitializationEntry]:
    result = initialize(model, *args, **options)
    assert result.model is model
    return {entry.layer: entry for entry in result.report.entries}


def found(model: nn.Module, **options: Any) -> dict[str, tuple[float | None, float | None]]:
    return {name: (entry.slope, entry.keep) for name, entry in entries(model, **options).items()}


def test_slopes_in_front_and_behind() -> None:
    layers = [nn.Linear(4, 4) for _ in range(5)]
    model = nn.Sequential(
        layers[0],
        nn.ReLU(),
        layers[1],
        nn.PReLU(4, init=0.5),
        nn.Dropout(0.2),
        layers[2],
        nn.Tanh(),
        layers[3],
        layers[4],
        nn.LeakyReLU(0.1),
    )
    assert found(model) == {"0": (1, 1), "2": (0, 1), "5": (0.5, 0.8), "7": (1, 1), "8": (1, 1)}
    assert found(model, mode="backward") == {"0": (0, 1), "2": (0.5, 1), "5": (1, 0.8), "7": (1, 1), "8": (0.1, 1)}
    reasons = [entry.reason for entry in entries(model).values()]
    assert reasons == [
        "first behind the model's input",
        "behind ReLU '1'",
        "behind PReLU '3'",
        "behind Tanh '6'",
        "behind Linear '7', no nonlinearity between",
    ]
    reasons = [entry.reason for entry in entries(model, mode="backward").values()]
    assert reasons[0] == "in front of ReLU '1'"
    assert reasons[3] == "in front of Linear '8', no nonlinearity between"
    last = nn.Sequential(nn.Linear(2, 2))
    assert entries(last, mode="backward")["0"].reason == "last in front of the output"
    assert entries(nn.Linear(2, 2))[""].reason == "the model's only layer"


@pytest.mark.parametrize("kind", ["BatchNorm1d", "MeanOnlyBatchNorm1d", "VarianceOnlyBatchNorm1d", "Whitening1d"])
def test_gradients_go_through_a_normalization_to_the_rectifier_behind_it(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), getattr(ours, kind)(4), nn.ReLU(), nn.Linear(4, 4))
    assert found(model, mode="backward") == {"0": (0, 1), "3": (1, 1)}
    assert found(model) == {"0": (1, 1), "3": (0, 1)}


BETWEEN: list[tuple[Callable[[], list[nn.Module]], float, float]] = [
    (lambda: [nn.ReLU6()], 0, 1),
    (lambda: [nn.GELU()], 0, 1),
    (lambda: [nn.SELU()], 1, 1),
    (lambda: [nn.Sigmoid()], 1, 1),
    (lambda: [nn.RReLU(0.3, 0.3)], 0.3, 1),
    (lambda: [nn.Dropout(0.5), nn.ReLU(), nn.Dropout1d(0.5), nn.Identity()], 0, 0.25),
    (lambda: [nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.2)], 1, 0.8),
    (lambda: [ours.BatchwiseDropout(0.5), nn.AlphaDropout(0.5)], 1, 0.5),
    (lambda: [nn.Dropout(1.0), nn.ReLU()], 0, 1),
    (lambda: [nn.ReLU(), ours.GaussianDropout(0.2), ours.Dropout(0.5, share=2)], 0, 0.4),
    (lambda: [nn.ReLU(), ours.UniformDropout(0.6)], 0, 1 / 1.12),
    (lambda: [nn.BatchNorm1d(8), nn.ReLU()], 0, 1),
    (lambda: [nn.ReLU(), nn.BatchNorm1d(8)], 1, 1),
    (lambda: [ours.BatchNorm1d(8, activation="leaky_relu"), nn.Dropout(0.5)], 0.01, 0.5),
    (lambda: [nn.Dropout(0.5), ours.BatchNorm1d(8, activation="relu")], 0, 1),
    (lambda: [nn.LeakyReLU(0.2), nn.MaxPool1d(2), nn.Upsample(scale_factor=2)], 1, 1),
    (lambda: [nn.LeakyReLU(0.2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(4)], 0.2, 1),
]


def test_what_stands_between_two_layers() -> None:
    for make, slope, keep in BETWEEN:
        model = nn.Sequential(nn.Conv1d(8, 8, 1), *make(), nn.Conv1d(8, 8, 1))
        name = str(len(model) - 1)
        got = found(model)[name]
        assert got == pytest.approx((slope, keep)), make()


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([0.3, 0.4]))
        self.layers = nn.ModuleList([nn.Conv2d(2, 2, 1) for _ in range(7)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.layers[0](x), 0.2)
        x = F.prelu(self.layers[1](F.max_pool2d(x, 1)), self.slopes)
        x = F.dropout(self.layers[2](x).relu(), 0.5, self.training)
        x = self.layers[3](F.dropout(x, p=0.2, training=False))
        y = self.layers[4](torch.sigmoid(x))
        return self.layers[6](torch.relu(y + self.layers[5](x)).mean((2, 3), keepdim=True))


def test_functions_and_methods() -> None:
    rms = math.sqrt((0.09 + 0.16) / 2)
    model = Functions()
    slopes = model.slopes.clone()
    got = found(model)
    expected = [(1, 1), (0.2, 1), (rms, 1), (0, 0.5), (1, 1), (1, 1), (0, 1)]
    for i, pair in enumerate(expected):
        assert got[f"layers.{i}"] == pytest.approx(pair), i
    got = found(model, mode="backward")
    # Layer 3 feeds a sigmoid and a layer: both count as 1. 4 and 5 go through the sum into a ReLU.
    expected = [(0.2, 1), (rms, 1), (0, 1), (1, 0.5), (0, 1), (0, 1), (1, 1)]
    for i, pair in enumerate(expected):
        assert got[f"layers.{i}"] == pytest.approx(pair), i
    assert torch.equal(model.slopes, slopes)
    torch.testing.assert_close(model.eval()(torch.randn(2, 2, 3, 3)).shape, torch.Size([2, 2, 1, 1]))


def test_weights_have_the_reported_deviation_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 64, 3, groups=2, bias=True),
        nn.BatchNorm2d(64),
        nn.PReLU(64),
        nn.ConvTranspose2d(64, 32, 4, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 40, dtype=torch.float64, bias=False),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(3.0)
    before = copy.deepcopy(model.state_dict())
    objects = [id(p) for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    state = torch.get_rng_state()
    report = initialize(model.train(), generator=torch.Generator().manual_seed(1)).report
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(p) for p in model.parameters()] == objects
    assert [p.grad for p in model.parameters()] == grads
    # 9 * 8/2;  16 * 64 / (2 * 2);  512
    assert [entry.terms for entry in report.initialized] == [36, 256, 512]
    for entry in report.initialized:
        layer = model.get_submodule(entry.layer)
        assert isinstance(layer.weight, Tensor)
        assert layer.weight.std().item() == pytest.approx(entry.std, rel=0.1)
        assert abs(layer.weight.mean().item()) < 0.1 * layer.weight.std().item()
    for name, value in model.state_dict().items():
        if name in ("0.bias", "3.bias"):
            assert not value.any()
        elif not name.startswith(("0.", "3.", "6.")):
            assert torch.equal(value, before[name])
    again = copy.deepcopy(model.state_dict())
    initialize(model, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_taken_by_parts() -> None:
    model = Untraceable()
    head = model.head.weight.clone()
    got = entries(model)
    assert (got["body.0"].slope, got["body.0"].reason) == (1, "first behind the input of 'body'")
    assert (got["body.2.0"].slope, got["body.2.0"].reason) == (0, "behind ReLU '1'")
    assert got["head"].action == "left"
    assert "use batchlab.nn.init" in got["head"].reason
    assert torch.equal(model.head.weight, head)


class Wide(nn.Linear):
    pass


def test_what_is_left_stays_and_is_named() -> None:
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "chain": nn.Sequential(
                nn.Linear(4, 4),
                Wide(4, 4),
                parametrizations.weight_norm(nn.Linear(4, 4)),
                nn.Linear(4, 4).requires_grad_(False),
                shared,
                nn.ReLU(),
                shared,
                tied,
                nn.LayerNorm((3, 4)),
            ),
            "embedding": nn.Embedding(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "twin": nn.Sequential(nn.Linear(4, 4)),
        }
    )
    tied.weight = model["embedding"].weight
    model["twin"][0].weight = model["chain"][0].weight
    before = copy.deepcopy(model.state_dict())
    got = entries(model)
    assert [name for name, entry in got.items() if entry.action == "initialized"] == ["chain.0", "chain.4"]
    assert got["chain.4"].reason.endswith("the first of 2 calls")
    reasons = {name: entry.reason for name, entry in got.items() if entry.action == "left"}
    assert reasons.pop("chain.1") == "a Wide is not one of torch's linear or convolution layers"
    assert reasons.pop("chain.2") == "its weight is computed from other tensors: initialize those"
    assert reasons.pop("chain.3") == "its weight is frozen (requires_grad=False)"
    assert reasons.pop("chain.7") == "its weight is that of 'embedding'"
    assert reasons.pop("twin.0") == "its weight is that of 'chain.0'"
    assert set(reasons) == {"embedding", "attention", "attention.out_proj"}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"chain.0.weight", "chain.0.bias", "twin.0.weight"} | {
        f"chain.{i}.{key}" for i in (4, 6) for key in ("weight", "bias")
    }


def test_errors_leave_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    for given, message in (
        ({"scheme": "kaiming"}, "scheme is 'kaiming'; allowed are 'he', 'xavier'"),
        ({"mode": "fan_in"}, "mode is 'fan_in'"),
        ({"distribution": "cauchy"}, "distribution is 'cauchy'; allowed are 'normal', 'uniform'"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(model, **given)
    with pytest.raises(ValueError, match="ReLU has no layer that can be initialized"):
        initialize(nn.ReLU())
    with pytest.raises(ValueError, match=r"can be initialized:\n  0: a Wide is not"):
        initialize(nn.Sequential(Wide(2, 2)))
    with pytest.raises(TypeError, match="DataParallel"):
        initialize(nn.DataParallel(model))
    with pytest.raises(ValueError, match="is not initialized"):
        initialize(nn.Sequential(nn.LazyLinear(3)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
