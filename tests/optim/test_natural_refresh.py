"""Refreshing during training: the model and its velocity stay what they are, and training is fast where it was slow."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchlab.nn import NaturalLinear
from batchlab.optim import NaturalRefresh, SubmatrixSGD
from tests.whitening_by_hand import correlated


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def network(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(NaturalLinear(5, 8, bias), nn.Tanh(), NaturalLinear(8, 2, bias)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x = correlated(30, 5, seed=seed, mean=1.0)
    return x, x[:, :2].sin()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, refresh: NaturalRefresh, seeds: range) -> None:
    for seed in seeds:
        x, target = batch(seed)
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        refresh.step()


def velocity(layer: NaturalLinear, optimizer: torch.optim.Optimizer) -> tuple[np.ndarray, np.ndarray]:
    """How W and b move along the momentum: by a difference of the layer's effective weights."""
    rate = 1e-3
    before, ahead = layer.merged(), copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            getattr(ahead, name).sub_(rate * optimizer.state[parameter]["momentum_buffer"])
    after = ahead.merged()
    b = 0 if before.bias is None else (after.bias - before.bias).detach().numpy() / rate
    return (after.weight - before.weight).detach().numpy() / rate, np.asarray(b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, SubmatrixSGD])
def test_transport_keeps_the_velocity_of_weights_and_biases(optimizer_class: Any, bias: bool) -> None:
    model = network(bias)
    optimizer = optimizer_class(model.parameters(), lr=0.05, momentum=0.9)
    refresh = NaturalRefresh(model, optimizer, every=1000)
    for seeds in (range(4), range(4, 7)):
        train(model, optimizer, refresh, seeds)
        x, _ = batch(9)
        layers = (model[0], model[2])
        y, before = model.eval()(x), [velocity(layer, optimizer) for layer in layers]  # type: ignore[arg-type]
        buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        assert refresh.refresh()
        torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
        for layer, expected in zip(layers, before, strict=True):
            for a, b in zip(velocity(layer, optimizer), expected, strict=True):  # type: ignore[arg-type]
                np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7)
        assert all(optimizer.state[p]["momentum_buffer"] is b for p, b in zip(model.parameters(), buffers, strict=True))
        model.train()


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "AdamW", "NAdam", "Adadelta", "ASGD", "Rprop"])
def test_reset_is_a_new_optimizer(name: str) -> None:
    cls: Any = getattr(torch.optim, name)
    options = {"momentum": 0.9} if name == "SGD" else {}
    model = network()
    optimizer = cls(model.parameters(), lr=0.01, **options)
    train(model, optimizer, NaturalRefresh(model, optimizer, every=3, momentum="reset"), range(3))
    twin = copy.deepcopy(model)
    fresh = cls(twin.parameters(), lr=0.01, **options)
    assert not optimizer.state
    for each, its in ((model, optimizer), (twin, fresh)):
        train(each, its, NaturalRefresh(each, its, every=100, momentum="reset"), range(3, 6))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resuming_is_bitwise() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, NaturalRefresh]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        return model, optimizer, NaturalRefresh(model, optimizer, every=4)

    whole, first, second = start(), start(), start()
    first[0].load_state_dict(whole[0].state_dict())
    train(*whole, range(11))
    train(*first, range(6))  # two steps into the second collection
    for a, b in zip(first, second, strict=True):
        b.load_state_dict(copy.deepcopy(a.state_dict()))
    train(*second, range(6, 11))
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name]), name


def test_refreshes_in_time_and_leaves_what_has_seen_nothing() -> None:
    model = nn.ModuleList([NaturalLinear(5, 2), NaturalLinear(5, 2), nn.Linear(5, 2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refresh = NaturalRefresh(model, optimizer, every=3)
    assert not refresh.refresh()
    model[0](torch.randn(9, 5))
    assert [refresh.step() for _ in range(4)] == [False, False, True, False]
    assert not torch.equal(model[0].whitening, torch.eye(5))
    assert torch.equal(model[1].whitening, torch.eye(5))


def test_frozen_parameters_are_carried_along() -> None:
    layer = NaturalLinear(5, 2).double()
    layer.v.requires_grad_(False)
    optimizer = torch.optim.SGD([layer.d], lr=0.1, momentum=0.9)
    train(layer, optimizer, NaturalRefresh(layer, optimizer, every=2), range(1))
    x, _ = batch(0)
    y, momentum = layer.eval()(x), optimizer.state[layer.d]["momentum_buffer"].clone()
    assert NaturalRefresh(layer, optimizer).refresh()
    torch.testing.assert_close(layer(x), y)
    assert torch.equal(optimizer.state[layer.d]["momentum_buffer"], momentum)


def test_what_it_refuses() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for options, message in (
        ({"every": 0}, "every is 0"),
        ({"every": True}, "every is True"),
        ({"momentum": "keep"}, "momentum is 'keep'; allowed are 'transport', 'reset'"),
    ):
        with pytest.raises(ValueError, match=message):
            NaturalRefresh(model, sgd, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with Adam use momentum='reset'"):
        NaturalRefresh(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="Adagrad cannot start anew"):
        NaturalRefresh(model, torch.optim.Adagrad(model.parameters()), momentum="reset")
    with pytest.raises(ValueError, match=r"Linear has no natural layer to refresh: .*to_natural"):
        NaturalRefresh(nn.Linear(2, 2), sgd)
    tied = nn.ModuleList([NaturalLinear(3, 3), NaturalLinear(3, 3)])
    tied[1].v = tied[0].v
    with pytest.raises(ValueError, match="'0' shares v or d with another module"):
        NaturalRefresh(tied, sgd)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = network()
    with pytest.raises(RuntimeError, match="there are 2 processes"):
        NaturalRefresh(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_badly_conditioned_regression_is_solved_in_a_few_steps() -> None:
    # Full batches; deviations from 0.01 to 10 and a mean of 5: the Hessian's condition is above 10⁶.
    rows = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = rows * torch.logspace(1, -2, 6, dtype=torch.float64) + 5
    target = x @ torch.ones(6, 1, dtype=torch.float64) + 2
    ones = torch.cat([x, torch.ones(400, 1, dtype=torch.float64)], 1)
    curvature = torch.linalg.eigvalsh(ones.mT @ ones / 400)
    assert curvature[-1] / curvature[0] > 1e6

    def losses(layer: nn.Module, rate: float, steps: int, *, refreshing: bool) -> list[float]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
        if refreshing:
            layer(x)
            assert NaturalRefresh(layer, optimizer).refresh()
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean() / 2
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    start = nn.Linear(6, 1, dtype=torch.float64)
    with torch.no_grad():
        start.weight.zero_()
        start.bias.zero_()
    best_rate = 2 / float(curvature[0] + curvature[-1])
    plain = losses(copy.deepcopy(start), best_rate, 1000, refreshing=False)
    natural = losses(NaturalLinear.from_module(copy.deepcopy(start), eps=1e-6), 1.0, 10, refreshing=True)
    assert natural[0] == pytest.approx(plain[0])
    assert natural[-1] < 1e-12 * natural[0]
    assert plain[-1] > 1e-6 * plain[0]
