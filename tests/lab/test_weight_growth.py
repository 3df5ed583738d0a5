"""How much the weights of a run grew, and runs whose last step was one too far."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from batchlab.lab.data import Dataset
from batchlab.lab.files import read_json
from batchlab.lab.measures import weight_lengths
from batchlab.lab.records import read_record
from batchlab.lab.run import build_network, run
from batchlab.lab.settings import DataSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.nn import FactoredLinear

SETTINGS = RunSettings(
    data=DataSettings(binarize=False),
    network=NetworkSettings((20, 12), "relu", initialization="he"),
    optimizer=OptimizerSettings(0.1),
    steps=20,
    batch_size=50,
    probe_units=0,
    evaluate_every=10,
    weight_growth=True,
    inference=False,
)


def test_length_is_that_of_what_is_learned_in_the_weights_place() -> None:
    factored = FactoredLinear(4, 3)
    nn.init.constant_(factored.g, 100.0)
    with torch.no_grad():
        factored.v.mul_(3.0)
    network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), factored, nn.BatchNorm1d(3), nn.Conv2d(1, 2, 3))
    expected = {
        "0": np.sqrt((network.get_parameter("0.weight").detach().double().numpy() ** 2).sum()),
        "2": np.sqrt((factored.v.detach().double().numpy() ** 2).sum()),
        "4": np.sqrt((network.get_parameter("4.weight").detach().double().numpy() ** 2).sum()),
    }
    assert weight_lengths(network) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("factorization", ["none", "weight_norm"])
def test_a_run_records_growth_from_its_first_weights(digits: Dataset, tmp_path: Path, factorization: str) -> None:
    settings = dataclasses.replace(SETTINGS, network=dataclasses.replace(SETTINGS.network, factorization=factorization))
    run(settings, digits, tmp_path)
    last = load_file(tmp_path / "weights.safetensors")
    first = build_network(settings, digits).state_dict()
    part = "v" if factorization == "weight_norm" else "weight"
    growth = read_record(tmp_path).result["weight_growth"]
    assert set(growth) == {"linear1", "linear2", "output"}
    for layer, value in growth.items():
        ends = [np.linalg.norm(state[f"{layer}.{part}"].double().numpy()) for state in (last, first)]
        assert value == pytest.approx(ends[0] / ends[1], rel=1e-5)
        assert value != 1


def test_what_is_recorded_at_the_end_leaves_the_run_as_it_was(digits: Dataset, tmp_path: Path) -> None:
    found: list[Any] = []
    for number, changes in enumerate(({}, {"weight_growth": False, "inference": True})):
        run(dataclasses.replace(SETTINGS, **changes), digits, tmp_path / str(number))
        found.append(read_json(tmp_path / str(number) / "result.json"))
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"]
    assert "inference" not in found[0]
    assert "weight_growth" not in found[1]
    assert set(found[1]["inference"]) == {"running_average"}


def test_a_last_step_that_is_one_too_far_counts_as_diverged(digits: Dataset, tmp_path: Path) -> None:
    # The loss of the one step is that of the first weights; what the step made of them only the evaluation sees.
    settings = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(1e30), steps=1, evaluate_every=1)
    run(settings, digits, tmp_path)
    record = read_record(tmp_path)
    assert record.diverged
    assert record.curve[0] == [0]
    assert "weight_growth" not in record.result
