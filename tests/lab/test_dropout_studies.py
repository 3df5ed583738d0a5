"""The studies of dropout end to end on sizes of seconds; runs with dropout repeat to the last bit."""

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from batchlab.lab.data import Dataset, load_embedded
from batchlab.lab.files import write_json
from batchlab.lab.networks import MLP
from batchlab.lab.records import read_record
from batchlab.lab.run import build_network, run
from batchlab.lab.settings import (
    DropoutSettings,
    NetworkSettings,
    OptimizerSettings,
    RunSettings,
    SettingsError,
    to_dict,
)
from batchlab.lab.studies import STUDIES
from batchlab.lab.studies.dropout_mnist.settings import DropoutMnistSettings
from batchlab.lab.studies.dropout_patterns.settings import DropoutPatternsSettings
from batchlab.lab.studies.search import search_plan
from batchlab.lab.study import Workplace
from batchlab.lab.training import evaluation_steps, train
from batchlab.nn import BatchwiseDropout

DROPOUTS = {
    "independent": DropoutSettings("independent"),
    "batchwise": DropoutSettings("batchwise"),
    "bernoulli": DropoutSettings("batchwise_bernoulli", input=0.0),
    "patterns": DropoutSettings("batchwise", patterns=3),
}


def settings(dropout: DropoutSettings, **changes: Any) -> RunSettings:
    algorithm = "sgd" if dropout.kind == "independent" else "submatrix_sgd"
    values: dict[str, Any] = {
        "network": NetworkSettings((20, 12), "relu", weight_std=0.0, dropout=dropout),
        "optimizer": OptimizerSettings(0.1, nesterov=True, schedule="exponential", algorithm=algorithm),
        "steps": 90,
        "batch_size": 30,
        "seed": 3,
        "evaluate_every": 20,
        "training_errors": True,
        "probe_units": 0,
    }
    return RunSettings(**(values | changes))


def outcome(folder: Path) -> dict[str, bytes]:
    names = ("run.json", "metrics.jsonl", "result.json", "weights.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def run_until_killed(dropout: DropoutSettings, folder: str, evaluations: int) -> None:
    torch.set_num_threads(1)
    left = evaluations

    def kill(_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    run(settings(dropout), load_embedded(), Path(folder), kill, 0.0)


@pytest.mark.parametrize("name", DROPOUTS)
def test_a_run_with_dropout_repeats_and_goes_on_after_a_kill(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    before = torch.get_rng_state()
    run(settings(DROPOUTS[name]), load_embedded(), tmp_path / "first")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)  # what the process drew before has no part in it
    run(settings(DROPOUTS[name]), load_embedded(), tmp_path / "second")
    process = multiprocessing.get_context("spawn").Process(
        target=run_until_killed, args=(DROPOUTS[name], str(tmp_path / "third"), 3)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    run(settings(DROPOUTS[name]), load_embedded(), tmp_path / "third")
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second") == outcome(tmp_path / "third")
    steps = [line["step"] for line in read_record(tmp_path / "first").metrics]
    assert steps == [0, 20, 40, 60, 80, 90]


def test_training_errors_are_counted_on_the_training_images(digits: Dataset, tmp_path: Path) -> None:
    run(settings(DROPOUTS["batchwise"]), digits, tmp_path)
    record = read_record(tmp_path)
    network = build_network(record.settings, digits)
    from safetensors.torch import load_file

    network.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    guesses = network.eval()(digits.train_images.float() / 255).argmax(1)
    assert record.metrics[-1]["training_errors"] == int((guesses != digits.train_labels).sum())


def test_all_dropouts_start_from_the_same_weights_and_have_the_same_keys() -> None:
    dataset = load_embedded()
    none = build_network(settings(DropoutSettings()), dataset)
    for dropout in DROPOUTS.values():
        other = build_network(settings(dropout), dataset)
        assert other.state_dict().keys() == none.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(none.parameters(), other.parameters(), strict=True))
    assert not none.output.weight.any()
    assert 0.9 * 784**-0.5 < float(none.linear1.weight.detach().abs().max()) <= 784**-0.5


@pytest.mark.parametrize("count", [1, 3])
def test_limited_patterns_are_used_in_turn(count: int) -> None:
    torch.manual_seed(0)
    network = MLP(10, 3, NetworkSettings((20, 20), "relu", dropout=DropoutSettings("batchwise", 0.2, 0.5, count)))
    seen: list[tuple[int, ...]] = []

    class Watch(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(tuple(int(i) for m in network.modules() if isinstance(m, BatchwiseDropout) for i in m.kept))

    images, labels = torch.rand(8, 10), torch.randint(0, 3, (8,))
    order = (torch.arange(8) for _ in range(9))
    optimizer = Watch(network.parameters(), lr=0.1)
    train(network, optimizer, OptimizerSettings(), images, labels, order, 0, 9, patterns=count)
    assert len(set(seen)) == count
    assert seen[:count] * (9 // count) == seen


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(SettingsError, match="only batchwise dropout has patterns"):
        DropoutSettings("independent", patterns=4)
    with pytest.raises(SettingsError, match=r"dropout\.hidden is 1\.0"):
        DropoutSettings("batchwise", hidden=1.0)
    with pytest.raises(SettingsError, match="allowed: 'none', 'independent'"):
        MLP(4, 2, NetworkSettings((3,), dropout=DropoutSettings("spatial")))
    with pytest.raises(SettingsError, match="algorithm"):
        OptimizerSettings(algorithm="adam")
    assert evaluation_steps(25, 0.05, every=10) == [0, 10, 20, 25]


def test_a_record_from_before_a_setting_existed_is_continued(digits: Dataset, tmp_path: Path) -> None:
    old = RunSettings(network=NetworkSettings((5,)), steps=20, batch_size=10)
    run(old, digits, tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    for name in ("evaluate_every", "training_errors"):
        del content["settings"][name]
    del content["settings"]["network"]["dropout"], content["settings"]["optimizer"]["algorithm"]
    write_json(tmp_path / "run.json", content)
    run(old, digits, tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run(dataclasses.replace(old, evaluate_every=5), digits, tmp_path)


TINY = {
    "dropout-mnist": DropoutMnistSettings(
        steps=60, seeds=2, rates=(0.1, 0.3), search_steps=20, widths=(30, 30), small_widths=(8, 8), evaluate_every=10
    ),
    "dropout-patterns": DropoutPatternsSettings(
        steps=60, seeds=2, patterns=(1, 4), rates=(0.1, 0.3), search_steps=20, widths=(30, 30), evaluate_every=10
    ),
}

ARMS = {
    "dropout-mnist": ("small", "none", "independent", "batchwise"),
    "dropout-patterns": ("exact", "bernoulli", "patterns1", "patterns4"),
}


@pytest.mark.parametrize("name", TINY)
def test_a_study_of_dropout_leaves_records_figures_and_a_report(name: str, digits: Dataset, tmp_path: Path) -> None:
    study, console = STUDIES[name], Console(record=True, width=200)
    # The workers load the embedded digits, so the whole set it is.
    page = study.run(TINY[name], Workplace(tmp_path / "out", load_embedded(), None, 2, console))
    first = {p.name: p.read_bytes() for p in page.parent.glob("*.*")}
    text = page.read_text()
    assert "The test images had no part in it" in text
    assert f"batchlab study {name} --settings" in text
    assert "nan" not in text.lower().replace("finan", "")
    summary = json.loads((page.parent / "summary.json").read_text())
    expected = set(ARMS[name])
    assert set(summary["errors"]) == set(summary["chosen"]) == expected
    assert {p.suffix for p in (page.parent / "figures").iterdir()} == {".svg"}
    study.report(page.parent, console)  # again, from the records
    assert {p.name: p.read_bytes() for p in page.parent.glob("*.*")} == first
    printed = console.export_text()
    assert "The report, with all figures:" in printed
    assert json.loads((page.parent / "study.json").read_text())["settings"] == to_dict(TINY[name])


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    "wrong",
    [
        {"seeds": 0},
        {"seeds": 5000},
        {"rates": ()},
        {"rates": (0.1, 0.1000001)},
        {"held_out_share": 1.0},
        {"evaluate_every": 0},
    ],
    ids=str,
)
def test_wrong_study_settings_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        dataclasses.replace(TINY[name], **wrong)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_rates_are_never_chosen_on_test_images_for_want_of_others(share: float) -> None:
    settings = dataclasses.replace(DropoutPatternsSettings(), held_out_share=share)
    with pytest.raises(SettingsError, match="of 60,000 training images that holds out"):
        search_plan(settings, {}, 60_000)


def test_one_seed_is_clear_of_nothing(tmp_path: Path) -> None:
    name = "dropout-patterns"
    settings = dataclasses.replace(TINY[name], seeds=1)
    STUDIES[name].run(settings, Workplace(tmp_path, load_embedded(), None, 1, Console(quiet=True)))
    page = (tmp_path / "report.html").read_text()
    assert "differ clearly" not in page
    assert "more than were tried" not in page
