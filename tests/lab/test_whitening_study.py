"""The study of whitening end to end on a size of seconds, and its sentences on numbers worked out by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from batchlab.lab.comparison import Estimate, StepsToTarget
from batchlab.lab.data import load_embedded
from batchlab.lab.networks import MLP
from batchlab.lab.settings import NetworkSettings, SettingsError
from batchlab.lab.studies import STUDIES
from batchlab.lab.studies.arm_results import ArmResult, accuracy_table, steps_table
from batchlab.lab.studies.whitening.settings import ARMS, WhiteningSettings
from batchlab.lab.studies.whitening.summary import Summary, answer, verdicts
from batchlab.lab.study import Workplace

TINY = WhiteningSettings(
    steps=40,
    seeds=2,
    rates=(0.3,),
    search_steps=10,
    widths=(64,),
    batch_size=100,
    spacing=0.5,
    targets=(0.15, 0.99),
)


def result(steps: tuple[int | None, ...], accuracy: float, baseline: bool = False) -> ArmResult:
    row = StepsToTarget(0.9, (200, 400), steps, None if None in steps else Estimate(2.0, 1.5, 2.5, 2))
    gain = None if baseline else Estimate(0.01, 0.002, 0.018, 2)
    return ArmResult(Estimate(accuracy, accuracy - 0.01, accuracy + 0.01, 2), gain, (row,), 0.002)


def summary(**than: Estimate) -> Summary:
    results = {name: result((100, 200), 0.95) for name in ARMS}
    results["none"] = result((200, 400), 0.94, baseline=True)
    results["whitening"] = result((100, None), 0.9)
    halves = {name: Estimate(r.mean / 2, r.low / 2, r.high / 2, r.n) for name, r in than.items()}
    return Summary(dict.fromkeys(ARMS, 0.3), {}, results, 0.9, than, halves)


def test_the_study_leaves_records_figures_and_a_report(tmp_path: Path) -> None:
    study, console = STUDIES["whitening"], Console(record=True, width=200)
    page = study.run(TINY, Workplace(tmp_path / "out", load_embedded(), None, 2, console))
    first = {p.name: p.read_bytes() for p in page.parent.glob("*.*")}
    found = json.loads((page.parent / "summary.json").read_text())
    assert set(found["results"]) == set(found["chosen"]) == set(ARMS)
    assert {p.name for p in (page.parent / "figures").iterdir()} == {"accuracy.svg", "rate-search.svg"}
    text = page.read_text()
    assert "The test images had no part in it" in text
    assert all(label in text for label in ARMS.values())
    assert "nan" not in text.lower().replace("finan", "")
    study.report(page.parent, console)
    assert {p.name: p.read_bytes() for p in page.parent.glob("*.*")} == first


def test_all_arms_start_from_the_same_weights() -> None:
    import torch

    networks = []
    for name in ARMS:
        torch.manual_seed(3)
        networks.append(MLP(784, 10, NetworkSettings((64, 128), "sigmoid", name)))
    for network in networks:
        for layer in ("linear1", "linear2", "output"):
            assert torch.equal(network.get_submodule(layer).weight, networks[0].get_submodule(layer).weight)
    outputs = [network.eval()(torch.rand(4, 784)) for network in networks]
    assert all(torch.isfinite(output).all() for output in outputs)


def test_sentences_say_what_the_numbers_say() -> None:
    clear, unclear = Estimate(1.4, 1.2, 1.6, 2), Estimate(0.9, 0.7, 1.1, 2)
    found = summary(none=Estimate(0.5, 0.4, 0.6, 2), whitening_16=clear, newton_64=unclear)
    speed, counts, ends = answer(TINY, found)
    assert speed.startswith("Until 90 % of the test images are recognized")
    assert "Clearly faster than batch norm: whitening, groups of 16 (1.40 (1.20 to 1.60) times fewer steps)." in speed
    assert "Clearly slower: none (2.00 (1.67 to 2.50) times as many steps)." in speed
    assert "No clear difference: Newton, groups of 64." in speed
    assert speed.endswith("whitening, groups of 64; whitening, all channels.")
    assert "none: 300; centering: 150" in counts
    assert "whitening, all channels: not in every run" in counts
    assert "94.00 % (93.00 to 95.00) of the test images are recognized without" in ends
    rows = dict(verdicts(found))
    assert "batch norm" not in rows
    assert rows["whitening, groups of 16"] == "1.40 (1.20 to 1.60): clearly faster"
    assert rows["Newton, groups of 64"] == "0.90 (0.70 to 1.10): no clear difference"
    assert rows["none"] == "0.50 (0.40 to 0.60): clearly slower"
    assert rows["whitening, all channels"] == "did not reach it in every run"
    seconds = dict(verdicts(found, seconds=True))
    assert seconds["whitening, groups of 16"] == "0.70 (0.60 to 0.80): clearly slower"
    assert seconds["Newton, groups of 64"] == "0.45 (0.35 to 0.55): clearly slower"
    assert answer(TINY, dataclasses.replace(found, target=None))[0].startswith("Of 15 %, 99 % no accuracy was reached")
    assert "Clearly faster than batch norm: nothing." in answer(TINY, summary(newton_64=unclear))[0]


def test_tables_quote_steps_seconds_and_gains() -> None:
    results = summary().results
    steps = {row[0]: row[1] for row in steps_table(results, ARMS, "").rows}
    assert steps["none"] == "300"
    assert steps["centering"] == "150, 2.0 times fewer"
    assert steps["whitening, all channels"] == "100 (1 of 2 runs)"
    slower = dataclasses.replace(results["mean_only"].steps[0], ratio=Estimate(0.5, 0.4, 0.6, 2))
    more = {"none": results["none"], "mean_only": dataclasses.replace(results["mean_only"], steps=(slower,))}
    assert steps_table(more, ARMS, "").rows[1] == ["centering", "150, 2.0 times more"]
    seconds = {row[0]: row[1] for row in steps_table(results, ARMS, "", seconds=True).rows}
    assert seconds["none"] == "0.6"
    row = accuracy_table(results, ARMS, dict.fromkeys(ARMS, 0.3), "").rows[1]
    assert row == ["centering", "0.3", "95.00 % (94.00 to 96.00)", "+1.00 (+0.20 to +1.80)", "2"]


@pytest.mark.parametrize(
    "wrong", [{"widths": (100,)}, {"targets": (1.5,)}, {"dataset": "cifar"}, {"seeds": 0}], ids=str
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"widths|targets|seeds"):
        dataclasses.replace(TINY, **(wrong if "dataset" not in wrong else wrong | {"targets": ()}))


def test_a_width_that_groups_do_not_divide_is_named() -> None:
    with pytest.raises(SettingsError, match=r"network\.widths has 60"):
        MLP(784, 10, NetworkSettings((60,), "sigmoid", "whitening_16"))
