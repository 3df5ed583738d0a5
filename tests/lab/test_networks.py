"""Networks of every mechanism: they start alike, train, and are resumed to the last bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.lab.data import load_embedded
from batchlab.lab.measures import learned_slopes, variance_shifts
from batchlab.lab.mechanisms import ACTIVATIONS, DROPOUTS, FACTORIZATIONS, NORMALIZATIONS
from batchlab.lab.networks import MLP, ConvolutionalNetwork, build
from batchlab.lab.optimizers import follow, make_optimizer, prepare
from batchlab.lab.run import run
from batchlab.lab.settings import (
    DataSettings,
    DropoutSettings,
    NetworkSettings,
    OptimizerSettings,
    RunSettings,
    SettingsError,
)
from batchlab.nn import BatchNorm1d
from batchlab.optim import PathSGD

FLAT = NetworkSettings((64, 64), "relu", initialization="he")
SPATIAL = replace(FLAT, widths=(64,), channels=(64,))


def made(settings: NetworkSettings, seed: int = 1) -> MLP | ConvolutionalNetwork:
    torch.manual_seed(seed)
    return build((8, 8), 10, settings)


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [m.weight for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


@pytest.mark.parametrize("shape", [FLAT, SPATIAL], ids=["mlp", "convolutional"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_normalization_starts_from_the_same_weights_and_trains(
    shape: NetworkSettings, normalization: str
) -> None:
    network, plain = made(replace(shape, normalization=normalization)), made(shape)
    assert all(torch.equal(a, b) for a, b in zip(weights(network), weights(plain), strict=True))
    images, labels = torch.rand(80, 8, 8), torch.arange(80) % 10
    F.cross_entropy(network(images), labels).backward()
    gradients = [p.grad for p in network.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert network.eval()(images[:1]).shape == (1, 10)


@pytest.mark.parametrize("shape", [FLAT, SPATIAL], ids=["mlp", "convolutional"])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_every_factorization_starts_as_the_plain_network(shape: NetworkSettings, factorization: str) -> None:
    if factorization == "natural" and shape.channels:
        with pytest.raises(SettingsError, match="natural coordinates are for linear layers"):
            replace(shape, factorization=factorization)
        return
    network, plain = made(replace(shape, factorization=factorization)), made(shape)
    for own, whole in zip(weights(network), weights(plain), strict=True):
        expected = whole.detach().double()
        if factorization in ("centered_weight_norm", "weight_standardization"):
            expected = expected - expected.flatten(1).mean(1).view(-1, *[1] * (expected.ndim - 1))
        assert torch.allclose(own.detach().double(), expected, rtol=1e-4, atol=1e-6)
    assert network(torch.rand(3, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("scheme", "gain"), [("he", 2.0), ("xavier", 1.0)])
def test_initial_deviations_are_those_of_the_schemes(activation: str, scheme: str, gain: float) -> None:
    network = made(NetworkSettings((2000, 2000), activation, initialization=scheme))
    slope = {"relu": 0.0, "silu": 0.0, "leaky_relu": 0.01, "prelu": 0.25}.get(activation, 1.0)
    later = gain / (1 + slope**2) if scheme == "he" else 1.0
    for number, (weight, terms) in enumerate(zip(weights(network), (1.0, later, later), strict=True)):
        expected = (terms / weight.shape[1]) ** 0.5
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.03), number
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))


def names(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_children()]


def test_dropouts_are_where_their_position_says() -> None:
    def order(position: str, shape: NetworkSettings = FLAT) -> list[str]:
        dropout = DropoutSettings("independent", 0.0, 0.5, position=position)
        return names(made(replace(shape, normalization="batch_norm", dropout=dropout)))

    hidden, before, last = (order(position) for position in ("hidden", "before_normalization", "last"))
    block = ["linear1", "normalization1", "activation1"]
    assert hidden == ["flatten", *block, "dropout1", *[n.replace("1", "2") for n in block], "dropout2", "output"]
    assert before[1:4] == ["linear1", "dropout1", "normalization1"]
    assert before[5:8] == ["linear2", "dropout2", "normalization2"]
    assert [name for name in last if name.startswith("dropout")] == ["dropout2"]
    assert last[-2:] == ["dropout2", "output"]
    spatial = order("hidden", SPATIAL)
    assert spatial[1:6] == ["convolution1", "normalization1", "activation1", "pooling1", "dropout1"]
    with pytest.raises(SettingsError, match=r"dropout\.position is 'first'"):
        DropoutSettings(position="first")


@pytest.mark.parametrize("kind", DROPOUTS)
def test_convolutional_dropout_takes_whole_feature_maps(kind: str) -> None:
    network = made(replace(SPATIAL, dropout=DropoutSettings(kind, 0.0, 0.5)))
    assert isinstance(network, ConvolutionalNetwork)
    maps = torch.ones(4, 64, 4, 4)
    for name, module in network.named_children():
        if name == "dropout1":
            out = module(maps)
            assert ((out == 0).all((2, 3)) | (out != 0).all((2, 3))).all()
            assert 0 < (out == 0).float().mean() < 1
            break
    else:
        assert kind == "none"


def test_images_too_small_for_their_poolings_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"network\.channels is \(4, 4, 4, 4\).*at most 3"):
        made(replace(SPATIAL, channels=(4, 4, 4, 4)))
    with pytest.raises(SettingsError, match=r"network\.channels has 60"):
        made(replace(SPATIAL, channels=(60,), normalization="whitening_16"))


MECHANISMS: dict[str, dict[str, Any]] = {
    "natural": {
        "network": NetworkSettings((20, 12), "relu", factorization="natural", refresh_every=7),
        "optimizer": OptimizerSettings(0.003),
    },
    "path_sgd": {
        "network": NetworkSettings((20, 12), "relu", initialization="he"),
        "optimizer": OptimizerSettings(0.01, 0.5, algorithm="path_sgd"),
    },
    "weight_norm from data": {
        "network": NetworkSettings((20, 12), "relu", "mean_only", factorization="weight_norm", data_start=True)
    },
    "population": {"network": NetworkSettings((20, 12), "relu", "population_batch_norm")},
    "noisy": {"network": NetworkSettings((20, 12), "prelu", "noisy_batch_norm")},
    "convolutional": {
        "network": NetworkSettings(
            (16,), "prelu", "batch_norm", 0.1, DropoutSettings("batchwise", 0.0, 0.5), channels=(8,)
        )
    },
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_an_interrupted_run_ends_the_same(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = RunSettings(steps=60, batch_size=30, seed=3, spacing=0.2, probe_units=2, **MECHANISMS[name])
    whole = load_embedded()
    # Small images, because whitening 784 inputs takes a second.
    digits = replace(
        whole,
        train_images=whole.train_images[:900, ::2, ::2],
        train_labels=whole.train_labels[:900],
        test_images=whole.test_images[:, ::2, ::2],
    )
    run(settings, digits, tmp_path / "whole")

    def interrupt(step: int) -> None:
        if step >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings, digits, tmp_path / "parts", interrupt, checkpoint_seconds=0.0)
    assert (tmp_path / "parts" / "checkpoint.pt").is_file()
    seen: list[int] = []
    run(settings, digits, tmp_path / "parts", seen.append)
    assert min(seen) >= 30
    for file in ("metrics.jsonl", "result.json", "weights.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_natural_layers_start_whitened_and_are_refreshed_in_time() -> None:
    settings = replace(FLAT, widths=(10,), factorization="natural", refresh_every=2)
    network, images = made(settings), torch.rand(300, 8, 8)
    before = network(images)
    prepare(network, settings, images)
    assert torch.allclose(network(images), before, atol=1e-3)
    layer: Any = network.get_submodule("linear1")
    whitened = (images.flatten(1) - layer.center) @ layer.whitening.T
    values = np.linalg.eigvalsh(np.cov(whitened.double().numpy().T))
    assert values.max() < 1.05  # eps leaves directions of little variance below 1
    optimizer = make_optimizer(network, OptimizerSettings(1e-3), images)
    follow(network, settings, optimizer, 1)
    refreshed = []
    for _ in range(4):
        before = layer.whitening.clone()
        optimizer.zero_grad()
        network(torch.rand(300, 8, 8)).square().mean().backward()
        optimizer.step()
        refreshed.append(not torch.equal(before, layer.whitening))
    assert refreshed == [True, False, True, False]  # steps 2 to 5


def test_gains_from_data_make_units_standard() -> None:
    settings = replace(FLAT, factorization="weight_norm", data_start=True)
    network, images = made(settings), torch.rand(500, 8, 8)
    prepare(network, settings, images)
    outputs = network.last_activation_input(images)
    assert torch.allclose(outputs.mean(0), torch.zeros(64), atol=1e-4)
    assert torch.allclose(outputs.std(0), torch.ones(64), atol=1e-2)
    with pytest.raises(SettingsError, match="no gains to start from data"):
        replace(FLAT, data_start=True)


def test_path_sgd_is_refused_what_it_does_not_have() -> None:
    assert isinstance(make_optimizer(made(FLAT), OptimizerSettings(algorithm="path_sgd"), torch.rand(2, 8, 8)), PathSGD)
    with pytest.raises(SettingsError, match="Path-SGD does not have"):
        OptimizerSettings(algorithm="path_sgd", weight_decay=1e-4)


def test_variance_shift_is_the_ratio_of_the_two_variances() -> None:
    network = made(replace(FLAT, normalization="batch_norm"))
    images = torch.rand(2500, 8, 8)
    network.eval()
    layer: Any = network.get_submodule("normalization2")
    hidden = network.get_submodule("activation1")(
        network.get_submodule("normalization1")(network.get_submodule("linear1")(images.flatten(1)))
    )
    entering = network.get_submodule("linear2")(hidden).detach().double().numpy()
    layer.running_var.copy_(torch.rand(64) + 0.5)
    running, real = layer.running_var.double().numpy() + layer.eps, entering.var(0, ddof=1) + layer.eps
    expected = np.maximum(running / real, real / running).mean()
    assert variance_shifts(network, images)["normalization2"] == pytest.approx(expected, rel=1e-4)


def test_dropout_in_front_of_a_batch_norm_shifts_its_variance_as_the_formula_says() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Dropout(0.5), BatchNorm1d(64, momentum=None))
    images = torch.randn(6000, 64)
    for part in images.split(100):
        network(part)
    assert variance_shifts(network, images)["1"] == pytest.approx(2.0, rel=0.03)  # E(1/p), Li et al. 2018


def test_a_run_records_slopes_and_shifts(tmp_path: Path) -> None:
    from batchlab.lab.files import read_json

    settings = RunSettings(
        data=DataSettings(),
        network=NetworkSettings((20, 12), "prelu", "batch_norm", initialization="he"),
        optimizer=OptimizerSettings(0.001),
        steps=30,
        batch_size=50,
        probe_units=0,
        variance_shift=True,
    )
    run(settings, load_embedded(), tmp_path)
    result: Any = read_json(tmp_path / "result.json")
    assert set(result["variance_shift"]) == {"normalization1", "normalization2"}
    assert all(value >= 1 for value in result["variance_shift"].values())
    assert set(result["slopes"]) == {"activation1", "activation2"}
    assert all(0 < abs(value - 0.25) < 0.2 for value in result["slopes"].values())
    assert learned_slopes(nn.Sequential(nn.PReLU(3, init=0.5), nn.ReLU())) == {"0": 0.5}
