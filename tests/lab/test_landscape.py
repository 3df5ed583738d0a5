"""Shift and landscape against closed forms, and that nothing is changed by looking."""

import itertools
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.lab.data import Dataset
from batchlab.lab.landscape import MULTIPLES, along_gradient, covariate_shift, landscape
from batchlab.lab.networks import MLP
from batchlab.lab.optimizers import make_optimizer
from batchlab.lab.run import run
from batchlab.lab.settings import (
    DropoutSettings,
    NetworkSettings,
    OptimizerSettings,
    RunSettings,
    SettingsError,
)

NORMALIZATIONS = ("none", "batch_norm", "noisy_batch_norm", "population_batch_norm")


class Quadratic(nn.Module):
    """½ θᵀ A θ."""

    def __init__(self, matrix: Tensor, theta: Tensor) -> None:
        super().__init__()
        self.matrix, self.theta = matrix, nn.Parameter(theta)

    def forward(self) -> Tensor:
        return self.theta @ self.matrix @ self.theta / 2


def quadratic(network: nn.Module) -> Tensor:
    loss: Tensor = network()
    return loss


def squares(x: Tensor, y: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda network: (network(x) - y).square().sum() / 2


def test_a_quadratic_has_the_curvature_along_its_gradient() -> None:
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, theta = root @ root.T, torch.randn(6, dtype=torch.float64)
    found = along_gradient(Quadratic(matrix, theta), quadratic, rate=0.03)
    a, t = matrix.numpy(), theta.numpy()
    g = a @ t
    assert found["loss"] == pytest.approx(t @ a @ t / 2)
    assert found["norm"] == pytest.approx(np.linalg.norm(g))
    assert found["smoothness"] == pytest.approx(np.linalg.norm(a @ g) / np.linalg.norm(g))
    for multiple, loss, change in zip(MULTIPLES, found["losses"], found["changes"], strict=True):
        there = t - multiple * 0.03 * g
        assert loss == pytest.approx(there @ a @ there / 2)
        assert change == pytest.approx(multiple * 0.03 * np.linalg.norm(a @ g))


def test_along_an_eigenvector_the_smoothness_is_the_largest_eigenvalue() -> None:
    matrix = torch.diag(torch.tensor([7.0, 2.0, 0.5], dtype=torch.float64))
    found = along_gradient(Quadratic(matrix, torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)), quadratic, 0.1)
    assert found["smoothness"] == pytest.approx(7.0)


def test_the_range_is_the_papers() -> None:
    assert (MULTIPLES[0], MULTIPLES[-1]) == (0.5, 4.0)
    assert list(MULTIPLES) == sorted(MULTIPLES)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_linear_network_shifts_as_worked_out_by_hand(momentum: float) -> None:
    torch.manual_seed(1)
    widths = (4, 3, 5, 2)
    layers = [nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in itertools.pairwise(widths)]
    network = nn.Sequential(*layers)
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=momentum)
    loss = squares(x, y)

    def gradients(weights: list[Any]) -> list[Any]:
        """∂/∂W_i ½ ||x W_1ᵀ W_2ᵀ W_3ᵀ - y||²."""
        values = [x.numpy()]
        for weight in weights:
            values.append(values[-1] @ weight.T)
        error, found = values[-1] - y.numpy(), []
        for weight, value in zip(reversed(weights), reversed(values[:-1]), strict=True):
            found.append(error.T @ value)
            error = error @ weight
        return found[::-1]

    velocity: list[Any] = [0.0] * 3
    for _ in range(3):  # the step that is looked at has momentum behind it
        w = [layer.weight.detach().numpy().copy() for layer in layers]
        g = gradients(w)
        found = covariate_shift(network, optimizer, loss)
        optimizer.zero_grad()
        loss(network).backward()
        optimizer.step()
        velocity = [momentum * v + own for v, own in zip(velocity, g, strict=True)]
        after = [weight - 0.02 * v for weight, v in zip(w, velocity, strict=True)]
        for place in (1, 2):
            other = gradients([*after[:place], *w[place:]])[place]
            norms = np.linalg.norm(g[place]), np.linalg.norm(other)
            assert found["gradient"][place - 1] == pytest.approx(norms[0])
            assert found["shift"][place - 1] == pytest.approx(np.linalg.norm(other - g[place]))
            assert found["cosine"][place - 1] == pytest.approx((other * g[place]).sum() / (norms[0] * norms[1]))
            inputs, moved = x.numpy(), x.numpy()
            for old, new in zip(w[:place], after[:place], strict=True):
                inputs, moved = inputs @ old.T, moved @ new.T
            far = ((moved.mean(0) - inputs.mean(0)) ** 2).sum() / inputs.var(0).sum()
            assert found["moved"][place - 1] == pytest.approx(far**0.5)
        assert "anew" not in found


def network_and_optimizer(normalization: str) -> tuple[MLP, torch.optim.Optimizer, Tensor, Tensor]:
    """After a few steps, so that there is momentum."""
    torch.manual_seed(2)
    network = MLP(20, 4, NetworkSettings((12, 10), "relu", normalization, initialization="he"))
    images, labels = torch.randn(30, 20), torch.randint(4, (30,))
    optimizer = make_optimizer(network, OptimizerSettings(0.1), images)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network, optimizer, images, labels


def everything(network: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    gradients = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    modes = [module.training for module in network.modules()]
    return deepcopy((network.state_dict(), optimizer.state_dict(), torch.get_rng_state(), gradients, modes))


def is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(is_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_looking_changes_nothing(normalization: str, training: bool) -> None:
    network, optimizer, images, labels = network_and_optimizer(normalization)
    network.train(training)
    before = everything(network, optimizer)
    found = landscape(network, optimizer, images, labels, 0.3)
    assert is_same(everything(network, optimizer), before)
    assert landscape(network, optimizer, images, labels, 0.3) == found
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_nothing_is_changed_when_the_loss_fails() -> None:
    network, optimizer, images, _ = network_and_optimizer("batch_norm")
    before = everything(network, optimizer)
    with pytest.raises(IndexError):
        landscape(network, optimizer, images, torch.full((30,), 9), 0.3)
    assert is_same(everything(network, optimizer), before)


@pytest.mark.parametrize("normalization", ["none", "batch_norm", "noisy_batch_norm"])
def test_the_shift_is_that_of_the_step_which_training_takes(normalization: str) -> None:
    """The last layer: the whole network in front of it as the real step leaves it, its own weight as it was."""
    network, optimizer, images, labels = network_and_optimizer(normalization)
    rate = optimizer.param_groups[0]["lr"]
    found = landscape(network, optimizer, images, labels, rate)["shift"]
    state, own = torch.get_rng_state(), deepcopy(network.output.state_dict())  # type: ignore[operator]

    def gradient() -> Tensor:
        (value,) = torch.autograd.grad(F.cross_entropy(network(images), labels), [network.output.weight])  # type: ignore[list-item]
        return value

    first = gradient()
    torch.set_rng_state(state)
    optimizer.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    following = torch.get_rng_state()
    optimizer.step()
    network.output.load_state_dict(own)  # type: ignore[operator]
    for kind, at in ((found, state), (found.get("anew", found), following)):
        torch.set_rng_state(at)
        assert kind["shift"][-1] == pytest.approx(float((gradient() - first).norm()), rel=1e-3)


def test_noise_is_the_same_on_both_sides_unless_it_is_the_next_steps() -> None:
    network, optimizer, images, labels = network_and_optimizer("noisy_batch_norm")
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    still = landscape(network, optimizer, images, labels, 1e-6)
    shift = still["shift"]
    assert all(a < 1e-4 * b for a, b in zip(shift["shift"], shift["gradient"], strict=True))
    assert all(a > 0.1 * b for a, b in zip(shift["anew"]["shift"], shift["gradient"], strict=True))
    assert shift["anew"]["moved"][0] > 0.01 > shift["moved"][0]
    assert max(still["along"]["changes"]) < 1e-4 * still["along"]["norm"]
    quiet = network_and_optimizer("batch_norm")
    assert "anew" not in landscape(*quiet, 0.1)["shift"]


def test_what_is_not_finite_is_recorded_as_nothing() -> None:
    network, optimizer, images, labels = network_and_optimizer("none")
    found = landscape(network, optimizer, images, labels, 1e30)
    assert found["along"]["smoothness"] is None
    assert None in found["along"]["changes"]
    json.dumps(found, allow_nan=False)


def run_settings(**changes: Any) -> RunSettings:
    values: dict[str, Any] = {
        "network": NetworkSettings((16, 12), normalization="noisy_batch_norm"),
        "optimizer": OptimizerSettings(0.3, schedule="linear"),
        "steps": 60,
        "batch_size": 30,
        "spacing": 0.5,
        "probe_units": 0,
    }
    return RunSettings(**(values | changes))


def test_a_run_that_is_looked_at_is_the_same_run(digits: Dataset, tmp_path: Path) -> None:
    run(run_settings(), digits, tmp_path / "without")
    run(run_settings(landscape=True), digits, tmp_path / "with")
    without, found = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("without", "with"))
    assert without == found
    assert "weights_sha256" in found
    lines = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    plain = [json.loads(line) for line in (tmp_path / "without" / "metrics.jsonl").read_text().splitlines()]
    assert [line.pop("landscape")["shift"].keys() for line in lines] == [
        {"gradient", "shift", "cosine", "moved", "anew"}
    ] * len(lines)
    assert lines == plain


def test_a_killed_run_goes_on_with_the_same_measurements(digits: Dataset, tmp_path: Path) -> None:
    def kill(step: int) -> None:
        if step >= 30:
            raise InterruptedError

    run(run_settings(landscape=True), digits, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(run_settings(landscape=True), digits, tmp_path / "parts", kill, checkpoint_seconds=0.0)
    run(run_settings(landscape=True), digits, tmp_path / "parts")
    for name in ("metrics.jsonl", "result.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_whose_last_step_went_too_far_is_recorded_as_diverged(digits: Dataset, tmp_path: Path) -> None:
    network = NetworkSettings((16,), "relu", weight_std=1.0)
    wild = run_settings(network=network, optimizer=OptimizerSettings(1e38), steps=1, landscape=True)
    run(wild, digits, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["steps"], result["evaluations"]) == ("diverged", 1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"network": NetworkSettings((8,), dropout=DropoutSettings("independent"))},
        {"network": NetworkSettings((8,), factorization="weight_norm")},
        {"network": NetworkSettings((8,), "relu"), "optimizer": OptimizerSettings(algorithm="path_sgd")},
    ],
    ids=["dropout", "factorization", "algorithm"],
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="landscape is True"):
        run_settings(landscape=True, **wrong)
