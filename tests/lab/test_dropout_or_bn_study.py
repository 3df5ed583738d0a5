"""The study dropout-or-bn end to end on a size of seconds, and its sentences on numbers worked out by hand."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from batchlab.lab.comparison import Estimate
from batchlab.lab.data import load_embedded
from batchlab.lab.networks import build
from batchlab.lab.records import RunRecord
from batchlab.lab.report import write_page
from batchlab.lab.settings import RunSettings, SettingsError
from batchlab.lab.studies import STUDIES
from batchlab.lab.studies.comparison_study import Finished, read_finished
from batchlab.lab.studies.dropout_or_bn import COMPARISON
from batchlab.lab.studies.dropout_or_bn.answer import answer, details, edge_sentence, verdicts
from batchlab.lab.studies.dropout_or_bn.arms import Arm, arms, named_arms
from batchlab.lab.studies.dropout_or_bn.figures import interval_figure
from batchlab.lab.studies.dropout_or_bn.page import error_table, shift_table
from batchlab.lab.studies.dropout_or_bn.settings import SIZES, DropoutOrBnSettings
from batchlab.lab.studies.dropout_or_bn.summary import Summary, summarize
from batchlab.lab.study import Workplace

TINY = DropoutOrBnSettings(
    steps=20,
    seeds=2,
    rates=(0.1,),
    search_steps=5,
    training_images=300,
    widths=(24, 24),
    shares=(0.5,),
    channels=(2,),
    channel_widths=(8,),
    batch_size=50,
    evaluate_every=10,
    targets=(0.3, 0.01),
)
BOTH, LAST, BATCHWISE = "bn-dropout0.5-hidden", "bn-dropout0.5-last", "bn-batchwise0.5-hidden"
ERRORS = {"none": 0.06, "dropout0.5": 0.05, "bn": 0.04, BOTH: 0.045, LAST: 0.041, "batchwise0.5": 0.052}


def record(
    name: str,
    arm: RunSettings,
    seed: int,
    error: float,
    repair: float = 0.0,
    shift: float = 1.0,
    diverged: bool = False,
) -> RunRecord:
    settings = dataclasses.replace(arm, seed=seed, steps=20)
    metrics = [{"step": step, "accuracy": 0.5 if step < 20 else 1 - error} for step in (0, 10, 20)]
    if diverged:
        return RunRecord(name, settings, {}, {}, metrics[:1], {"status": "diverged", "steps": 5}, {})
    layers = {"normalization1": 1.0, "normalization2": shift}
    result = {
        "status": "finished",
        "steps": 20,
        "inference": {"running_average": 1 - error, "recalibrated": 1 - error - repair},
        "variance_shift": layers,
        "expected_shift": layers | {"normalization2": shift + 0.05},
        "mean_shift": {"normalization1": 0.0, "normalization2": 0.125},
    }
    return RunRecord(name, settings, {}, {}, metrics, result, {"processor_seconds": 2.0})


def summary(settings: DropoutOrBnSettings = TINY, diverged: tuple[str, ...] = (), **errors: float) -> Summary:
    """Seeds differ by 0.02 points, the same in all arms but for 0.02 more in arms with both."""
    records, chosen = {}, {}
    for name, run in arms(settings).items():
        arm, chosen[name] = named_arms(settings)[name], 0.1
        mean = errors.get(name, ERRORS.get(name, 0.045 if arm.share else 0.04))
        for seed in range(settings.seeds):
            error = mean + 0.0002 * seed + 0.0002 * seed * (arm.batch_norm and arm.share > 0)
            shift = 1.0 if not arm.share or arm.place == "last" else 1.5 if arm.place == "hidden" else 3.0
            records[f"runs/final/{name}-rate0.1-seed{seed}"] = record(
                name, run, seed, error, -0.001 * (shift - 1), shift, name in diverged
            )
    return summarize(Finished(settings, {"training_images": 60_000}, records, chosen, {}))


def test_the_study_leaves_records_figures_and_a_report(tmp_path: Path) -> None:
    study, console = STUDIES["dropout-or-bn"], Console(record=True, width=200)
    page = study.run(TINY, Workplace(tmp_path / "out", load_embedded(), None, 2, console))
    first = {p.name: p.read_bytes() for p in page.parent.glob("*.*")}
    found = json.loads((page.parent / "summary.json").read_text())
    assert set(found["errors"]) == set(found["chosen"]) == set(arms(TINY))
    assert set(found["statistics"]) == {name for name, arm in named_arms(TINY).items() if arm.batch_norm}
    names = {"errors", "recalibration", "test-error", *(f"rate-search-{index}" for index in (1, 2, 3, 4))}
    assert {p.stem for p in (page.parent / "figures").iterdir()} == names
    text = page.read_text()
    assert "The test images had no part in it" in text
    assert "trained on 300 images" in text
    assert "nan" not in text.lower().replace("finan", "")
    study.report(page.parent, console)
    assert {p.name: p.read_bytes() for p in page.parent.glob("*.*")} == first

    finished = read_finished(COMPARISON, page.parent)
    once = dataclasses.replace(finished, settings=dataclasses.replace(TINY, seeds=1))
    numbers = summarize(once)
    write_page(COMPARISON.build_page(once, numbers, "again", dict.fromkeys(names, "")), tmp_path / "once.html")
    alone = (tmp_path / "once.html").read_text()
    assert "One run each does not tell how sure that is" in alone
    assert "nan" not in alone.lower().replace("finan", "")


def test_arms_differ_in_what_they_are_named_for_alone() -> None:
    full = SIZES["full"]
    found = arms(full)
    assert len(found) == 18
    assert found["none"].network.dropout.input == found[BOTH].network.dropout.input == 0
    labels = [arm.label for arm in named_arms(full).values()]
    assert len(set(labels)) == len(labels)
    assert named_arms(full)[BOTH].label == "BN + dropout 0.5, between"
    assert named_arms(full)["conv-none"] == Arm(convolutional=True)
    same = {dataclasses.replace(run, network=found["none"].network, variance_shift=False) for run in found.values()}
    assert len(same) == 3  # sgd or submatrix_sgd, and how often the convolutional network is evaluated
    networks = []
    for name, run in found.items():
        torch.manual_seed(4)
        if not name.startswith("conv"):
            networks.append(build((28, 28), 10, dataclasses.replace(run.network, widths=(20, 20))))
    for network in networks:
        for layer in ("linear1", "linear2", "output"):
            assert torch.equal(network.get_submodule(layer).weight, networks[0].get_submodule(layer).weight)


def test_the_numbers_are_differences_seed_by_seed() -> None:
    found = summary()
    assert found.images == 300
    assert found.errors["bn"].mean == pytest.approx(0.0401)
    assert found.instead["dropout0.5"].mean == pytest.approx(-0.01)
    assert found.instead["dropout0.5"].low == pytest.approx(found.instead["dropout0.5"].high)
    assert found.to_neither["dropout0.5"].mean == pytest.approx(-0.01)
    assert found.to_batch_norm[BOTH].mean == pytest.approx(0.0051)
    # Two seeds: 0.005 and 0.0052, deviation 0.0002/√2, Student's t 12.706.
    assert found.to_batch_norm[BOTH].high - found.to_batch_norm[BOTH].mean == pytest.approx(12.706 * 0.0001, rel=1e-3)
    assert found.to_dropout["bn"].mean == pytest.approx(-0.02)
    assert found.to_dropout[BATCHWISE].mean == pytest.approx(0.045 + 0.0001 - 0.052)
    assert found.to_hidden[LAST].mean == pytest.approx(-0.004)
    assert set(found.to_independent) == {"batchwise0.5", BATCHWISE, *(f"bn-batchwise0.5-{p}" for p in PLACED)}
    assert found.statistics[BOTH].worst == "normalization2"
    assert found.statistics[BOTH].repair.mean == pytest.approx(-0.0005)
    # Errors change by -0.001 (shift - 1), for shifts of 1, 1.5 and 3, two arms each.
    points = np.log([1, 1, 1.5, 1.5, 3, 3]), np.array([0, 0, -0.5, -0.5, -2, -2])
    assert found.correlation == pytest.approx(np.corrcoef(*points)[0, 1])
    assert found.results["bn"].steps[0].other == (20, 20)
    assert found.results["bn"].seconds_per_step == pytest.approx(0.1)
    assert not any(name.startswith("conv") for name in found.results)


PLACED = ("before_normalization", "last")


def test_sentences_say_what_the_numbers_say() -> None:
    instead, both, shift = answer(TINY, summary())
    assert instead.startswith("Trained on 300 images, the network gets 6.01 % (5.88 to 6.14) of the test images wrong")
    assert "with neither, 5.01 % (4.88 to 5.14) with dropout 0.5, and 4.01 % (3.88 to 4.14) with batch norm." in instead
    assert "Batch norm alone is better than dropout alone here: against dropout 0.5 1.00 percentage points" in instead
    assert "against batch norm alone 0.51 percentage points more (95 % interval 0.38 to 0.64, 2 seeds)" in both
    assert "Of the 6 ways to have both, 0 are clearly better than batch norm alone and 5 clearly worse." in both
    assert (
        "off by 1.50 times (between the layers; theory 1.55) and 3.00 times (directly in front of it; theory" in shift
    )
    assert "changes by -0.20 to +0.00 percentage points, clearly for the better in 4 of 6." in shift


def test_the_opposite_outcome_is_told_as_well() -> None:
    worse = summary(**{"bn": 0.055, "conv-bn": 0.055})
    instead, both, _ = answer(TINY, worse)
    assert "Batch norm alone does not replace dropout here" in instead
    assert "clearly better than batch norm alone and 0 clearly worse" in both
    assert details(TINY, worse)[0].startswith("No way to have both is clearly worse")
    tie = dataclasses.replace(worse, instead={"dropout0.5": Estimate(0.001, -0.01, 0.012, 2)})
    assert (
        "Which of the two alone is better, these runs do not tell: against dropout 0.5 no clear" in answer(TINY, tie)[0]
    )
    two = dataclasses.replace(TINY, shares=(0.2, 0.5))
    mixed = answer(two, summary(two, **{"dropout0.2": 0.03}))[0]
    assert "depends on the share that is dropped: against dropout 0.2 1.00 percentage points more" in mixed
    assert "; against dropout 0.5 1.00 percentage points fewer" in mixed


def test_details_tell_what_recalibration_takes_back_and_the_fix() -> None:
    harm, related, fix, whole = details(TINY, summary())
    assert "BN + dropout 0.5, between: +0.51 points, of which recalibration takes back 0.05" in harm
    assert "BN + batchwise 0.5, last: +0.51 points, of which recalibration takes back 0.00" in harm
    assert "is -0.99" in related
    assert "as Li et al. propose: 4.12 %" in fix
    assert "between the layers 0.40 percentage points fewer" in fix
    assert whole.startswith("Batchwise dropout 0.5 alone: 5.21 %")
    rows = dict(verdicts(TINY, summary()))
    assert rows["dropout between the layers shifts batch norm's variance (Li et al. 2018)"] == "1.50 times, theory 1.55"
    assert len(rows) == 6


def test_diverged_arms_are_counted_and_do_not_crash() -> None:
    everything = tuple(name for name in arms(TINY))
    for gone in ((BOTH,), everything):
        found = summary(diverged=gone)
        words = " ".join([*answer(TINY, found), *details(TINY, found), *(row[1] for row in verdicts(TINY, found))])
        assert "nan" not in words.replace("finan", "")
        assert found.errors[BOTH].mean == pytest.approx(0.9)
        cells = {row[0]: row[2] for row in error_table(TINY, found, "").rows}
        assert cells["BN + dropout 0.5, between"].endswith("(2 of 2 diverged)")
        assert BOTH not in found.statistics
    assert found.correlation is None
    assert answer(TINY, found)[2] == "The shift of the variance was not measured: the runs with both diverged."
    assert shift_table(TINY, found, "").rows == []


def test_one_seed_makes_no_verdict() -> None:
    once = dataclasses.replace(TINY, seeds=1)
    found = summary(once)
    words = " ".join([*answer(once, found), *details(once, found)])
    assert "One run each does not tell how sure that is" in words
    assert "(one seed, so without an interval)" in words
    assert "clearly" not in words
    assert not any(math.isnan(value.mean) for value in found.errors.values())


def test_the_page_says_whether_the_search_is_closed() -> None:
    three = dataclasses.replace(TINY, rates=(0.03, 0.1, 0.3))
    found = dataclasses.replace(summary(three), at_edge=["bn"])
    assert edge_sentence(three, found).endswith("may lie outside, for: BN (0.1).")
    assert "smaller and a larger one" in edge_sentence(three, dataclasses.replace(found, at_edge=[]))
    assert edge_sentence(TINY, found) == "Only the rate 0.1 was tried, so a better one may lie anywhere."
    assert summary(three).at_edge == []
    assert set(summary(dataclasses.replace(TINY, rates=(0.1, 0.3))).at_edge) == set(arms(TINY))


def test_tables_quote_gains_and_shifts() -> None:
    rows = {row[0]: row[1:] for row in error_table(TINY, summary(), "").rows}
    assert rows["neither"] == ["0.1", "6.01 % (5.88 to 6.14)", "–", "–"]
    assert rows["dropout 0.5"][2:] == ["-1.00 (-1.00 to -1.00)", "–"]
    assert rows["BN"][2:] == ["–", "-2.00 (-2.00 to -2.00)"]
    shifts = {row[0]: row[1:] for row in shift_table(TINY, summary(), "").rows}
    assert shifts["BN + dropout 0.5, before BN"] == ["2", "3.00", "3.05", "0.12", "-0.20 (-0.20 to -0.20)"]


def test_a_figure_of_intervals_names_every_row() -> None:
    groups = [{"one": Estimate(0.02, 0.01, 0.03, 5)}, {}, {"two": Estimate(0.5, math.nan, math.nan, 1)}]
    drawn = interval_figure("f", groups, level=0.1, x_label="errors", description="two rows")
    assert all(f">{word}<" in drawn for word in ("one", "two", "errors"))
    assert "nan" not in drawn


WRONG: list[dict[str, Any]] = [
    {"widths": (100,)},
    {"shares": ()},
    {"shares": (0.5, 0.5)},
    {"shares": (0.1, 0.2, 0.3)},
    {"shares": (1.0,)},
    {"channel_share": 0.0},
    {"evaluate_every": 0},
    {"targets": (1.5,)},
    {"dataset": "cifar", "targets": ()},
    {"seeds": 0},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong)) if "dataset" not in wrong else "targets"):
        dataclasses.replace(TINY, **wrong)


def test_every_size_has_the_arms_that_the_sentences_name() -> None:
    for size in SIZES.values():
        assert {Arm(True, "independent", size.shares[-1], "last").name, "bn", "none"} <= set(COMPARISON.arms(size))
