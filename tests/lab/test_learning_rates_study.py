"""The study of learning rates end to end on a size of seconds, and its limits and sentences worked out by hand."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from batchlab.lab.comparison import Estimate
from batchlab.lab.data import load_embedded
from batchlab.lab.networks import build
from batchlab.lab.settings import SettingsError
from batchlab.lab.studies import STUDIES
from batchlab.lab.studies.arm_results import ArmResult
from batchlab.lab.studies.learning_rates import COMPARISON
from batchlab.lab.studies.learning_rates.answer import answer, at_baseline, growth_sentence, open_ends, span, verdict
from batchlab.lab.studies.learning_rates.page import (
    accuracy_table,
    best_table,
    goal_table,
    growth_table,
    range_table,
    verdict_table,
)
from batchlab.lab.studies.learning_rates.settings import (
    ACTIVATIONS,
    MECHANISMS,
    SIZES,
    LearningRatesSettings,
    label,
)
from batchlab.lab.studies.learning_rates.summary import Condition, Limits, Summary, Times, compare_limits, limits
from batchlab.lab.study import Workplace

TINY = LearningRatesSettings(
    steps=20,
    seeds=1,
    rates=(0.1, 1e4),
    search_steps=20,
    search_seeds=2,
    widths=(64,),
    evaluate_every=10,
    target=0.3,
)
RATES = (0.1, 1.0, 10.0, 100.0)
SETTINGS = dataclasses.replace(TINY, rates=RATES, target=0.9, activations=("relu",))


def scored(*rows: str) -> dict[float, list[float]]:
    """For each seed a row of one letter a rate: o trains, x does not."""
    return {rate: [0.95 if row[place] == "o" else 0.1 for row in rows] for place, rate in enumerate(RATES)}


def condition(**arms: dict[float, list[float]]) -> Condition:
    scores = {f"relu_{name}": found for name, found in arms.items()}
    each = {
        name: limits({rate: min(values) >= 0.9 for rate, values in found.items()}) for name, found in scores.items()
    }
    others = {name: found for name, found in scores.items() if name != "relu_none"}
    compared = [
        {
            name: ratio
            for name, found in scores.items()
            if name != base and (ratio := compare_limits(scores[base], found, 0.9, upper=upper))
        }
        for base, upper in (("relu_none", True), ("relu_none", False), ("relu_batch_norm", True))
    ]
    result = ArmResult(Estimate(0.95, 0.94, 0.96, 2), Estimate(0.01, 0.002, 0.018, 2), (), 0.001)
    return Condition(
        scores,
        dict.fromkeys(scores, 1.0),
        each,
        *compared,
        {0.8: Times(5, 2, 10), 0.9: Times(10, 1, 100)},
        {name: {1.0: 1.1, 10.0: 2.0} for name in scores},
        {name: Estimate(0.012, 0.003, 0.021, 2) for name in others},
        {
            name: result if name in others else ArmResult(Estimate(0.94, 0.93, 0.95, 2), None, (), 0.001)
            for name in scores
        },
    )


def test_the_study_leaves_records_figures_and_a_report(tmp_path: Path) -> None:
    study, console = STUDIES["learning-rates"], Console(record=True, width=200)
    page = study.run(TINY, Workplace(tmp_path / "out", load_embedded(), None, 2, console))
    first = {p.name: p.read_bytes() for p in page.parent.glob("*.*")}
    found = json.loads((page.parent / "summary.json").read_text())["conditions"]
    assert set(found) == {"relu", "sigmoid"}
    assert set(found["relu"]["chosen"]) == set(TINY.arms("relu"))
    assert {p.stem for p in (page.parent / "figures").iterdir()} == {
        "relu-accuracy",
        "relu-ranges",
        "relu-growth",
        "sigmoid-accuracy",
        "sigmoid-ranges",
    }
    # A rate of ten thousand is too large for every network; that is a result, not a failure.
    assert all(limit["highest"] != 1e4 for limit in found["relu"]["limits"].values())
    text = page.read_text()
    assert all(words in text for words, _, _ in MECHANISMS.values())
    assert "nan" not in text.lower().replace("finan", "")
    assert "The best rate is the smallest or the largest tried for" in text
    study.report(page.parent, console)
    assert {p.name: p.read_bytes() for p in page.parent.glob("*.*")} == first


def test_the_arms_differ_in_their_mechanism_alone() -> None:
    arms = COMPARISON.arms(SIZES["full"])
    assert len(arms) == sum(len(names) for _, names in ACTIVATIONS.values())
    assert list(arms) == [name for activation in ACTIVATIONS for name in SIZES["full"].arms(activation)]
    for name, run in arms.items():
        activation, mechanism = name.split("_", 1)
        base = arms[f"{activation}_none"]
        network = dataclasses.replace(
            base.network, normalization=MECHANISMS[mechanism][1], factorization=MECHANISMS[mechanism][2]
        )
        assert run == dataclasses.replace(base, network=network)
        build((28, 28), 10, run.network)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ("xoox", Limits(1.0, 10.0)),
        ("ooxo", Limits(0.1, 1.0, open_below=True)),
        ("oxoo", Limits(10.0, 100.0, open_above=True)),
        ("oxox", Limits(10.0, 10.0)),
        ("oooo", Limits(0.1, 100.0, True, True)),
        ("xxxx", Limits(None, None)),
    ],
)
def test_a_range_is_the_widest_unbroken_row_of_rates(trained: str, expected: Limits) -> None:
    assert limits({rate: letter == "o" for rate, letter in zip(RATES, trained, strict=True)}) == expected
    # In whatever order the settings name the rates.
    assert limits({rate: letter == "o" for rate, letter in reversed([*zip(RATES, trained, strict=True)])}) == expected


def test_width_is_in_powers_of_ten() -> None:
    assert Limits(0.1, 10.0).decades == pytest.approx(2)
    assert Limits(3.0, 3.0).decades == 0
    assert Limits(None, None).decades is None


def test_bounds_of_a_ratio_cover_the_gaps_between_rates_and_all_seeds() -> None:
    # The baseline's limit is between 1 and 10 for both seeds; the other's between 10 and 100.
    assert compare_limits(scored("xoxx", "xoxx"), scored("xoox", "xoox"), 0.9, upper=True) == Times(10, 1, 100)
    # One seed of the other stops where the baseline does: not a clear difference any more.
    split = compare_limits(scored("xoxx", "xoxx"), scored("xoox", "xoxx"), 0.9, upper=True)
    assert split == Times(1, 0.1, 100)
    assert not split.larger
    # One seed of the baseline goes on as far as the other's.
    assert compare_limits(scored("xoxx", "xoox"), scored("xoox", "xoox"), 0.9, upper=True) == Times(10, 0.1, 100)
    # Beyond the largest rate nobody looked.
    assert compare_limits(scored("xoxx", "xoxx"), scored("xooo", "xooo"), 0.9, upper=True) == Times(100, 10, None)
    assert compare_limits(scored("xooo", "xooo"), scored("xoxx", "xoxx"), 0.9, upper=True) == Times(0.01, 0, 0.1)


def test_bounds_of_the_smallest_rates() -> None:
    assert compare_limits(scored("xxox", "xxox"), scored("xoox", "xoox"), 0.9, upper=False) == Times(0.1, 0.01, 1)
    # The baseline trains down to the smallest rate tried: its own limit may be anything below.
    assert compare_limits(scored("ooxx", "ooxx"), scored("xoox", "xoox"), 0.9, upper=False) == Times(10, 1, None)


def test_arms_that_never_train_are_not_compared() -> None:
    assert compare_limits(scored("xxxx", "xxxx"), scored("xoox", "xoox"), 0.9, upper=True) is None
    assert compare_limits(scored("xoox", "xoox"), scored("xoox", "xxxx"), 0.9, upper=True) is None
    # Each seed trains at some rate, but no rate trains both.
    assert compare_limits(scored("xoxx", "xoxx"), scored("xoxx", "xxox"), 0.9, upper=True) is None


def test_verdicts_follow_the_bounds() -> None:
    assert verdict(Times(10, 1, 100), 3) == "clearly larger"
    assert verdict(Times(0.1, 0.01, 1), 3) == "clearly smaller"
    assert verdict(Times(1, 0.1, 10), 3) == "no clear difference"
    assert verdict(Times(10, 0.1, None), 3) == "no clear difference"
    assert verdict(Times(100, 10, None), 1) == "one run a rate, so without a verdict"


def test_sentences_say_what_the_numbers_say() -> None:
    found = condition(
        none=scored("xoxx", "xoxx"),
        batch_norm=scored("ooox", "ooox"),
        mean_only=scored("xoxx", "xoox"),
        weight_norm=scored("oxxx", "oxxx"),
        whitening=scored("xxxx", "xxxx"),
    )
    first, others = answer(SETTINGS, Summary({"relu": found}))
    assert first == (
        "A rate trains a network here if 90 % of held-out images are recognized after 20 steps, in each of 2 runs. "
        "With ReLU units the network trains without a mechanism at 1 alone, with batch norm from 0.1 or less to 10; "
        "its best rate is 1 without, 1 with batch norm. "
        "Batch norm's largest rate is 10 times (1 to 100) as large: clearly larger."
    )
    assert others.startswith("The other mechanisms' largest rate with ReLU units, against that without a mechanism: ")
    assert "batch norm" not in others
    assert "no clear difference for centering (equal)" in others
    assert "clearly smaller for weight norm (0.1 times)" in others
    assert "no rate trains every run of whitening" in others
    assert growth_sentence(found, "relu_batch_norm") == (
        "batch norm: 2 times as long at the end, at 10, so they turn as if it were 2.5"
    )
    assert growth_sentence(found, "relu_none") == "none: 1.1 times as long at the end, at 1"
    assert "left no weights" in growth_sentence(found, "relu_whitening")
    assert at_baseline(SETTINGS, found, "relu") == "+1.2 points (+0.3 to +2.1) at 1: clearly more"
    assert "batch norm, ReLU (down)" in open_ends(SETTINGS, Summary({"relu": found}))
    assert "best rate is" not in open_ends(SETTINGS, Summary({"relu": found}))


def test_sentences_of_the_opposite_outcome() -> None:
    found = condition(none=scored("xoox", "xoox"), batch_norm=scored("xoxx", "xoxx"))
    assert (
        "Batch norm's largest rate is 0.1 times (0.01 to 1) as large: clearly smaller."
        in answer(SETTINGS, Summary({"relu": found}))[0]
    )
    nowhere = condition(none=scored("xxxx", "xxxx"), batch_norm=scored("xoxx", "xoxx"))
    first, others = answer(SETTINGS, Summary({"relu": nowhere}))
    assert "without a mechanism at no rate tried, with batch norm at 1 alone; its best" in first
    assert "largest rate is" not in first
    assert others == "ReLU units: there is nothing else to compare."
    worse = dataclasses.replace(found, at_baseline={"relu_batch_norm": Estimate(-0.02, -0.03, -0.01, 2)})
    assert at_baseline(SETTINGS, worse, "relu").endswith("clearly less")
    unclear = dataclasses.replace(found, at_baseline={"relu_batch_norm": Estimate(-0.02, -0.05, 0.01, 2)})
    assert at_baseline(SETTINGS, unclear, "relu").endswith("no clear difference")


def test_one_seed_gives_no_verdict_and_no_interval() -> None:
    one = dataclasses.replace(SETTINGS, search_seeds=1)
    found = condition(none=scored("xoxx"), batch_norm=scored("xoox"))
    found = dataclasses.replace(found, at_baseline={"relu_batch_norm": Estimate(0.01, math.nan, math.nan, 1)})
    first, _ = answer(one, Summary({"relu": found}))
    assert "in its one run" in first
    assert first.endswith("one run a rate, so without a verdict.")
    assert at_baseline(one, found, "relu") == "+1.0 points at 1 (one seed)"


def test_tables_quote_ranges_accuracies_and_growth() -> None:
    found = condition(none=scored("xoxx", "xoxx"), batch_norm=scored("xoox", "xoox"), whitening=scored("xxxx", "xxxx"))
    ranges = {row[0]: row[1:] for row in range_table(SETTINGS, found, "").rows}
    assert ranges["none"] == ["at 1 alone", "0.0", "–", "0.1 times (0.01 to 1): clearly smaller"]
    assert ranges["batch norm"] == ["from 1 to 10", "1.0", "10 times (1 to 100): clearly larger", "–"]
    assert ranges["whitening"] == ["at no rate tried", "–", "–", "–"]
    assert accuracy_table(SETTINGS, found, "").rows[0] == ["none", "10.0", "95.0", "10.0", "10.0"]
    tests = best_table(found, "").rows
    assert tests[0] == ["none", "1", "94.00 % (93.00 to 95.00)", "–"]
    assert tests[1] == ["batch norm", "1", "95.00 % (94.00 to 96.00)", "+1.00 (+0.20 to +1.80)"]
    growth = {row[0]: row[1:] for row in growth_table(found, "").rows}
    assert growth["none"] == ["1", "1.1", "–", "1", "1.1", "–"]
    assert growth["batch norm"] == ["1", "1.1", "0.83", "10", "2", "2.5"]
    assert growth["whitening"][3:] == ["–", "–", "–"]
    goals = goal_table(SETTINGS, Summary({"relu": found}), "").rows
    assert goals == [["80 %", "5 times (2 to 10): clearly larger"], ["90 %", "10 times (1 to 100): clearly larger"]]
    claims: dict[str, str] = {row[0]: row[1] for row in verdict_table(SETTINGS, Summary({"relu": found}), "").rows}
    assert claims["batch norm allows much higher learning rates"] == "ReLU: 10 times (1 to 100), clearly larger"
    assert (
        "10 times: 10.0 % and 95.0 %"
        in claims["5 and 30 times the baseline's rate train with batch norm; without it, 5 times does not"]
    )


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"widths": (100,)}, "widths"),
        ({"batch_size": 60}, "batch_size"),
        ({"target": 1.5}, "target"),
        ({"activations": ()}, "activations"),
        ({"activations": ("tanh",)}, "activations"),
        ({"seeds": 0}, "seeds"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        dataclasses.replace(TINY, **wrong)


def test_words_for_ranges_and_arms() -> None:
    assert span(Limits(0.001, 3.0)) == "from 0.001 to 3"
    assert span(Limits(3.0, 3.0)) == "at 3 alone"
    assert span(Limits(3.0, 3.0, open_above=True)) == "from 3 to 3 or more"
    assert span(Limits(0.001, 3.0, True, True)) == "from 0.001 or less to 3 or more"
    assert label("relu_batch_norm") == "batch norm"
    assert SIZES["full"].goal == 0.9
    assert dataclasses.replace(SIZES["full"], dataset="fashion").goal == 0.8
