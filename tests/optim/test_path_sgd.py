"""Path-SGD does not see how a network is balanced; where κ is 1 it is torch's SGD."""

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from batchlab.optim import PathSGD
from batchlab.reference import path_norm as reference


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3)
    ).double()


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(3, 2),
    ).double()  # fmt: skip


def rescale(model: nn.Sequential, exponent: float, seed: int = 0) -> nn.Sequential:
    """The same function: what enters a unit times a, what leaves it over a; a from 10^-exponent to 10^exponent."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for layer in model if isinstance(layer, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        for one, other in itertools.pairwise(layers):
            spread = torch.rand(one.weight.shape[0], dtype=torch.float64, generator=generator) * 2 - 1
            a = 10 ** (exponent * spread)
            one.weight.mul_(a.view([-1] + [1] * (one.weight.ndim - 1)))
            one.bias.mul_(a)
            other.weight.div_(a.view([1, -1] + [1] * (other.weight.ndim - 2)))
    return model


def losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int, start: int = 0
) -> list[float]:
    found = []
    for step in range(start, start + steps):
        rows = torch.arange(step * 4, step * 4 + 8) % len(x)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def data(*shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, dtype=torch.float64, generator=generator), torch.arange(shape[0]) % classes


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.2},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "every-third": {"lr": 0.1, "update_every": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("make", [mlp, convnet])
def test_rescaled_networks_stay_the_same_function(make: Any, name: str) -> None:
    shape = (24, 5) if make is mlp else (24, 2, 7, 7)
    x, y = data(*shape, classes=2)
    balanced = make()
    unbalanced = rescale(balanced, 2.0)
    torch.testing.assert_close(balanced(x), unbalanced(x))
    start = balanced(x).detach()
    curves = []
    for model in (balanced, unbalanced):
        optimizer = PathSGD(model.parameters(), model=model, example_input=x, **OPTIONS[name])
        curves.append(losses(model, optimizer, x, y, 12))
    torch.testing.assert_close(balanced(x), unbalanced(x), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(*curves, rtol=1e-8, atol=1e-9)
    assert (balanced(x) - start).abs().max() > 0.01  # it did train


def test_sgd_sees_the_balance() -> None:
    x, y = data(24, 5)
    balanced = mlp()
    unbalanced = rescale(balanced, 0.5)
    for model in (balanced, unbalanced):
        losses(model, torch.optim.SGD(model.parameters(), lr=0.01), x, y, 12)
    assert (balanced(x) - unbalanced(x)).abs().max() > 0.01


@settings(max_examples=15, deadline=None)
@given(exponent=st.floats(0, 4), seed=st.integers(0, 1000))
def test_one_step_moves_weights_as_they_are_scaled(exponent: float, seed: int) -> None:
    x, y = data(8, 5)
    model = mlp(seed)
    other = rescale(model, exponent, seed)
    for one in (model, other):
        losses(one, PathSGD(one.parameters(), 0.1, model=one, example_input=x), x, y, 1)
    expected = rescale(model, exponent, seed)
    for one, right in zip(other.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-8, atol=0.0 + 1e-10 * right.abs().max().item())


def test_training_from_balanced_and_unbalanced_starts() -> None:
    """The paper's comparison, small: the loss falls, on one curve; SGD's curves differ, or it diverges."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, dtype=torch.float64, generator=generator)
    y = (x @ torch.randn(5, 3, dtype=torch.float64, generator=generator)).argmax(1)
    curves: dict[str, list[list[float]]] = {"path": [], "sgd": []}
    for kind in curves:
        for model in (mlp(), rescale(mlp(), 1.0)):
            optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.1)
            if kind == "path":
                optimizer = PathSGD(model.parameters(), 0.2, model=model, example_input=x)
            curves[kind].append(losses(model, optimizer, x, y, 60))
    torch.testing.assert_close(*curves["path"], rtol=1e-6, atol=1e-7)
    first, last = sum(curves["path"][0][:5]), sum(curves["path"][0][-5:])
    assert last < 0.7 * first
    apart = torch.tensor(curves["sgd"][0]) - torch.tensor(curves["sgd"][1])
    assert not apart.abs().max() < 0.05


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_layer_is_sgd(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """All κ are 1: each weight is a path."""
    x, y = data(24, 5)
    models = [nn.Linear(5, 3).to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    path = PathSGD(models[0].parameters(), 0.1, model=models[0], example_input=x, **options)
    losses(models[0], path, x.to(dtype), y, 6)
    losses(models[1], torch.optim.SGD(models[1].parameters(), 0.1, **options), x.to(dtype), y, 6)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=tolerance, atol=tolerance)


class Shifted(nn.Module):
    """Two parameters whose κ is one tensor to autograd, and the loss moves both alike."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.zeros(1, 5)), nn.Parameter(torch.zeros(1, 5))
        self.layer = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.one + self.two)


@pytest.mark.parametrize("eps", [0.0, 0.9])
def test_parameters_with_the_same_kappa(eps: float) -> None:
    x, y = data(8, 5)
    model = Shifted()
    kappa = model.layer.weight.detach().double().square().sum(0, keepdim=True)
    kappa = kappa.clamp(min=eps * kappa.max())
    losses(model, PathSGD(model.parameters(), 0.1, eps=eps, model=model, example_input=x), x.float(), y, 1)
    for shift in (model.one, model.two):
        assert shift.grad is not None
        torch.testing.assert_close(shift.double(), -0.1 * shift.grad / kappa)


def test_a_step_is_the_references() -> None:
    x, y = data(8, 5)
    model = mlp()
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    optimizer = PathSGD(model.parameters(), 0.3, model=model, example_input=x)
    of_weights, of_biases = reference.kappas([m.weight.detach() for m in layers], [m.bias.detach() for m in layers])
    before = copy.deepcopy(layers)
    losses(model, optimizer, x, y, 1)
    for old, new, kappa, other in zip(before, layers, of_weights, of_biases, strict=True):
        assert new.weight.grad is not None
        assert new.bias.grad is not None
        assert other is not None
        torch.testing.assert_close(new.weight, reference.step(old.weight, new.weight.grad, kappa, 0.3))
        torch.testing.assert_close(new.bias, reference.step(old.bias, new.bias.grad, other, 0.3))


def test_edges_without_paths_rest_and_eps_bounds_the_others() -> None:
    x, y = data(8, 5)
    model = mlp()
    with torch.no_grad():
        model[3].weight[:, 0] = 0  # nothing leaves unit 0
        model[3].weight[:, 1] = 1e-9
    before = copy.deepcopy(model)
    losses(model, PathSGD(model.parameters(), 0.01, model=model, example_input=x), x, y, 1)
    assert torch.equal(model[0].weight[0], before[0].weight[0])
    assert model[3].weight[:, 0].any()  # their own paths come from the inputs: they train
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    free = (model[0].weight - before[0].weight)[1].abs().max()
    bounded = copy.deepcopy(before)
    optimizer = PathSGD(bounded.parameters(), 0.01, eps=1e-3, model=bounded, example_input=x)
    kappa = optimizer.kappas()["0.weight"]
    losses(bounded, optimizer, x, y, 1)
    moved = (bounded[0].weight - before[0].weight)[1]
    assert moved.abs().max() < 1e-3 * free
    assert bounded[0].weight.grad is not None
    torch.testing.assert_close(moved, -0.01 * bounded[0].weight.grad[1] / (1e-3 * kappa.max()))


def test_all_zero_weights_rest() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = PathSGD(model.parameters(), 0.1, eps=1e-3, model=model, example_input=torch.ones(2, 3))
    F.cross_entropy(model(torch.ones(2, 3)), torch.tensor([0, 0])).backward()
    optimizer.step()
    assert [bool(parameter.any()) for parameter in model.parameters()] == [False, False, False, True]


def test_thirty_layers_neither_overflow_nor_vanish() -> None:
    for scale in (1e-2, 1.0, 1e3):
        torch.manual_seed(0)
        layers = [m for _ in range(30) for m in (nn.Linear(20, 20), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(20, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        kappas = PathSGD(model.parameters(), 0.1, model=model, example_input=torch.ones(1, 20)).kappas()
        assert all(kappa.isfinite().all() and (kappa > 0).all() for kappa in kappas.values())


@pytest.mark.parametrize("exponent", [0, 12, -12, 17])
def test_float32_takes_layers_far_out_of_balance(exponent: int) -> None:
    x, y = data(24, 5)
    curves = []
    for a in (1.0, 10.0**exponent):
        model = mlp().float()
        with torch.no_grad():
            model[0].weight.mul_(a), model[0].bias.mul_(a), model[3].weight.div_(a)
        optimizer = PathSGD(model.parameters(), 0.2, model=model, example_input=x)
        curves.append(losses(model, optimizer, x.float(), y, 8))
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-4)


def test_infinite_sums_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    optimizer = PathSGD(model.parameters(), 0.1, momentum=0.5, model=model, example_input=torch.ones(2, 3))
    model(torch.ones(2, 3)).sum().backward()
    model[0].weight.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="infinite or NaN, and nothing was changed"):
        optimizer.step()
    assert all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["state", "deepcopy", "pickle", "file"])
@pytest.mark.parametrize("name", OPTIONS)
def test_training_goes_on_bitwise(name: str, how: str, dtype: torch.dtype) -> None:
    x, y = data(24, 5)
    model = mlp().to(dtype)
    x = x.to(dtype)
    optimizer = PathSGD(model.parameters(), model=model, example_input=x, **OPTIONS[name])
    losses(model, optimizer, x, y, 4)
    if how == "deepcopy":
        other, resumed = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        other, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other = copy.deepcopy(model)
        resumed = PathSGD(other.parameters(), model=other, example_input=x, **OPTIONS[name] | {"lr": 9.0})
        state = copy.deepcopy(optimizer.state_dict())  # loading takes the buffers themselves, as in torch
        if how == "file":
            torch.save(state, stream := io.BytesIO())
            stream.seek(0)
            state = torch.load(stream)
        resumed.load_state_dict(state)
    expected = losses(model, optimizer, x, y, 5, start=4)
    assert losses(other, resumed, x, y, 5, start=4) == expected
    for one, right in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, right)


def test_groups_closure_schedule_and_frozen_parameters() -> None:
    x, y = data(24, 5)
    model = mlp()
    frozen = model[3].weight.requires_grad_(False)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": [frozen]}]
    optimizer = PathSGD(groups, 0.1, model=model, example_input=x, update_every=2)
    optimizer.add_param_group({"params": model[5].parameters(), "lr": torch.tensor(0.05)})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = copy.deepcopy(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    found = []
    for _ in range(3):
        found.append(optimizer.step(closure).item())
        schedule.step()
    assert found[2] < found[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {"5.weight", "5.bias"}
    assert set(optimizer.kappas()) == {"0.weight", "0.bias", "3.weight", "5.weight", "5.bias"}
    PathSGD(model.named_parameters(), 0.1, model=model, example_input=x)
    optimizer.zero_grad()
    assert optimizer.step() is None


X = torch.ones(2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1; it must be 0 or more"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 1.0}, "momentum is 1.0; it must be from 0 to below 1"),
        ({"eps": 1.5}, "eps is 1.5; it must be from 0 to 1"),
        ({"update_every": 0}, "update_every is 0; it must be a whole number"),
        ({"update_every": True}, "update_every is True"),
        ({"example_input": torch.ones(5)}, r"shape \(5,\) .* must be a batch of real numbers"),
        ({"example_input": torch.ones(2, 5, dtype=torch.long)}, "dtype torch.int64; it must be a batch"),
        ({"example_input": []}, "example_input is empty"),
        ({"example_input": [X, 3]}, "example_input holds a int"),
        ({"params": [nn.Parameter(torch.ones(2, 7))]}, r"parameters of shapes \[\(2, 7\)\] are not the model's"),
        ({"model": nn.DataParallel(nn.Linear(5, 3))}, "wrapped in DataParallel; give model.module"),
        ({"model": torch.compile(nn.Linear(5, 3))}, "wrapped in OptimizedModule; give model._orig_mod"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    model = nn.Linear(5, 3)
    with pytest.raises(ValueError, match=message):
        PathSGD(**{"params": model.parameters(), "lr": 0.1, "model": model, "example_input": X} | options)


def test_refusals_leave_the_optimizer_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"1 \(Sigmoid\) uses sigmoid"):
        PathSGD(model.parameters(), 0.1, model=model, example_input=X)
    with pytest.raises(TypeError, match="model is a list"):
        PathSGD(model.parameters(), 0.1, model=[model], example_input=X)  # type: ignore[arg-type]
    optimizer = PathSGD([model[0].weight], 0.1, model=model[0], example_input=X)
    for group in ({"params": [nn.Parameter(torch.ones(1))]}, {"params": [model[0].bias], "lr": -1.0}):
        with pytest.raises(ValueError, match=r"not the model's|lr is"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
