"""What is measured on networks, against loops in numpy."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.lab.data import load_embedded
from batchlab.lab.measures import signals
from batchlab.lab.networks import MLP, build
from batchlab.lab.records import read_record
from batchlab.lab.run import run
from batchlab.lab.settings import DropoutSettings, NetworkSettings, OptimizerSettings, RunSettings, SettingsError


def numpy_signals(network: Any, images: np.ndarray, labels: np.ndarray, slope: float) -> dict[str, list[float]]:
    """Forward and backward by hand through Linear, rectifier, Linear, rectifier, Linear."""
    weights = [getattr(network, name).weight.detach().double().numpy() for name in ("linear1", "linear2", "output")]
    entering, x = [], images
    for weight in weights[:2]:
        entering.append(x @ weight.T)
        x = np.where(entering[-1] > 0, entering[-1], slope * entering[-1])
    scores = x @ weights[2].T
    likely = np.exp(scores - scores.max(1, keepdims=True))
    likely /= likely.sum(1, keepdims=True)
    likely[np.arange(len(labels)), labels] -= 1
    second = likely @ weights[2] * np.where(entering[1] > 0, 1, slope)
    first = second @ weights[1] * np.where(entering[0] > 0, 1, slope)
    return {
        "size": [float(np.mean(y**2)) for y in entering],
        "differing": [float(np.mean(y.var(0))) for y in entering],
        "gradient": [float(np.mean(g**2)) for g in (first, second)],
    }


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("prelu", 0.25)])
def test_signals_are_those_of_a_pass_by_hand(activation: str, slope: float) -> None:
    torch.manual_seed(0)
    network = MLP(20, 5, NetworkSettings((12, 9), activation, initialization="he"))
    images, labels = torch.randn(70, 20) + 3, torch.randint(0, 5, (70,))
    network.eval()
    found = signals(network, images, labels)
    expected = numpy_signals(network, images.double().numpy(), labels.numpy(), slope)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-4)
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_batch_norm_sets_the_signal_anew_and_is_left_alone() -> None:
    torch.manual_seed(0)
    network = MLP(20, 5, NetworkSettings((12, 9), "sigmoid", "batch_norm"))
    images, labels = torch.randn(50, 20) * 7 + 100, torch.randint(0, 5, (50,))
    before, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    found = signals(network, images, labels)
    assert found["size"] == pytest.approx([1, 1], rel=1e-2)
    assert found["differing"] == pytest.approx([1, 1], rel=1e-2)
    assert min(found["gradient"]) > 0
    assert network.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_an_error_leaves_the_network_as_it_was() -> None:
    network = MLP(20, 5, NetworkSettings((12, 9), "relu", "batch_norm")).eval()
    with pytest.raises(RuntimeError):
        signals(network, torch.randn(50, 21), torch.zeros(50, dtype=torch.long))
    assert not network.training
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert all(module.update_statistics for module in network.statistics_layers())


def test_a_convolution_has_one_number_a_layer() -> None:
    settings = NetworkSettings((6,), "relu", "batch_norm", channels=(4,))
    network = build((8, 8), 10, settings)
    found = signals(network, torch.rand(30, 8, 8), torch.randint(0, 10, (30,)))
    assert {name: len(values) for name, values in found.items()} == {"size": 2, "differing": 2, "gradient": 2}


def test_a_run_records_the_signal_of_its_untrained_network_and_trains_the_same(tmp_path: Any) -> None:
    plain = RunSettings(
        network=NetworkSettings((20, 12), "relu", "batch_norm", initialization="he"),
        optimizer=OptimizerSettings(0.1),
        steps=30,
        batch_size=50,
        probe_units=0,
    )
    seen = RunSettings(**{**vars(plain), "signal": True})
    run(plain, load_embedded(), tmp_path / "plain")
    run(seen, load_embedded(), tmp_path / "seen")

    def interrupt(step: int) -> None:
        if step >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(seen, load_embedded(), tmp_path / "parts", interrupt, checkpoint_seconds=0.0)
    run(seen, load_embedded(), tmp_path / "parts")
    first, second = (read_record(tmp_path / name).result for name in ("plain", "seen"))
    assert second == read_record(tmp_path / "parts").result
    assert first == {name: value for name, value in second.items() if name != "signal"}
    assert second["signal"]["size"] == pytest.approx([1, 1], rel=1e-2)


def test_dropout_is_refused() -> None:
    with pytest.raises(SettingsError, match="signal is True"):
        RunSettings(network=NetworkSettings(dropout=DropoutSettings("independent")), signal=True)


def test_the_theory_of_he_holds_in_a_wide_network() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(64, 500), torch.zeros(64, dtype=torch.long)
    for initialization, factor in (("he", 1.0), ("xavier", 0.5)):
        network = MLP(500, 10, NetworkSettings((500,) * 6, "relu", initialization=initialization))
        sizes = signals(network, images, labels)["size"]
        assert sizes[-1] / sizes[0] == pytest.approx(factor**5, rel=0.25)
    assert isinstance(network.get_submodule("activation1"), nn.ReLU)


def test_a_last_step_that_overflows_is_a_run_that_diverged(tmp_path: Any) -> None:
    settings = RunSettings(
        network=NetworkSettings((20, 12), "relu", initialization="he"),
        optimizer=OptimizerSettings(1e20),
        steps=5,
        batch_size=50,
        probe_units=0,
        evaluate_every=1,
    )
    run(settings, load_embedded(), tmp_path)
    record = read_record(tmp_path)
    assert record.diverged
    assert [line["step"] for line in record.metrics] == [0]
