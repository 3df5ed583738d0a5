"""The study of factorizations end to end on a size of seconds, and its sentences on numbers worked out by hand."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from batchlab.lab.comparison import Estimate, StepsToTarget, estimate, paired_ratio, paired_share
from batchlab.lab.data import load_embedded
from batchlab.lab.figures import interval_rows
from batchlab.lab.networks import MLP
from batchlab.lab.settings import SettingsError
from batchlab.lab.studies import STUDIES
from batchlab.lab.studies.arm_results import ArmResult
from batchlab.lab.studies.factorization import arms
from batchlab.lab.studies.factorization.answer import answer, ends, kept, search_note, seconds, verdict
from batchlab.lab.studies.factorization.page import share_table, verdict_table
from batchlab.lab.studies.factorization.settings import ARMS, LABELS, SIZES, FactorizationSettings, full_name
from batchlab.lab.studies.factorization.summary import Summary, compare
from batchlab.lab.studies.search import final_plan, search_plan
from batchlab.lab.studies.settings import ComparisonSettings
from batchlab.lab.study import Workplace

TINY = FactorizationSettings(
    steps=30,
    seeds=2,
    rates=(0.03,),
    search_steps=10,
    search_seeds=1,
    widths=(12, 10),
    batch_size=50,
    spacing=0.5,
    targets=(0.12, 0.99),
)
PLAIN = (400, 480, 400)


def result(steps: tuple[int | None, ...], baseline: tuple[int, ...] = PLAIN, accuracy: float = 0.95) -> ArmResult:
    both = [(a, b) for a, b in zip(baseline, steps, strict=True) if b is not None]
    ratio = paired_ratio(*map(list, zip(*both, strict=True))) if both else None
    gain = None if steps == baseline else Estimate(0.01, 0.002, 0.018, len(steps))
    found = Estimate(accuracy, accuracy - 0.01, accuracy + 0.01, len(steps))
    return ArmResult(found, gain, (StepsToTarget(0.9, baseline, steps, ratio),), 0.002)


def summary(reference: tuple[int | None, ...] = (100, 120, 100), **steps: tuple[int | None, ...]) -> Summary:
    results = {name: result(steps.get(name, PLAIN)) for name in ARMS} | {"batch_norm": result(reference)}
    return Summary(dict.fromkeys(arms(ONE), 0.03), {}, {"he": compare(results)})


ONE = dataclasses.replace(SIZES["full"], starts=("he",), steps=1000)


def shares(found: Summary) -> dict[str, str]:
    rows = share_table(ONE, found, "").rows
    return {name: row[2] for name, row in zip(ARMS, rows, strict=True)}


def verdicts(found: Summary) -> dict[str, str]:
    names = {label: name for name, label in LABELS.items()}
    return {names[label]: said for label, _, said in verdict_table(found.starts["he"], "").rows}


def test_the_study_leaves_records_figures_and_a_report(tmp_path: Path) -> None:
    study, console = STUDIES["factorization"], Console(record=True, width=200)
    one = dataclasses.replace(TINY, starts=("small",))
    page = study.run(one, Workplace(tmp_path / "out", load_embedded(), None, 2, console))
    first = {p.name: p.read_bytes() for p in page.parent.glob("*.*")}
    found = json.loads((page.parent / "summary.json").read_text())
    assert set(found["chosen"]) == {full_name(name, "small") for name in ARMS}
    assert set(found["starts"]["small"]["results"]) == set(ARMS)
    assert found["chosen"]["path_sgd-small"] == 3e-5
    assert found["chosen"]["natural-small"] == 0.003
    drawn = {p.stem for p in (page.parent / "figures").iterdir()}
    assert {f"rate-search-{panel}-small" for panel in ("weights", "activations")} <= drawn
    text = page.read_text()
    assert "Only one rate was tried" in text
    assert all(label in text for label in LABELS.values())
    assert "(for Path-SGD from a small start times 0.001; for natural (PRONG) from a small start times 0.1)" in text
    assert "nan" not in text.lower().replace("finan", "")
    study.report(page.parent, console)
    assert {p.name: p.read_bytes() for p in page.parent.glob("*.*")} == first


def test_arms_share_what_is_drawn() -> None:
    drawn: dict[str, list[torch.Tensor]] = {"he": [], "small": []}
    for name, run in arms(SIZES["full"]).items():
        assert run.optimizer.momentum == 0.9
        if run.network.factorization != "none":
            continue
        torch.manual_seed(3)
        drawn[name.rpartition("-")[2]].append(MLP(784, 10, run.network).get_submodule("linear2").weight)
    for start, deviation in (("he", 0.02**0.5), ("small", 0.05)):
        assert len(drawn[start]) == 6  # plain, Path-SGD, batch norm and three of its kind
        assert all(torch.equal(weight, drawn[start][0]) for weight in drawn[start])
        assert abs(drawn[start][0].std().item() - deviation) < 0.003


def test_every_arm_has_its_own_rates_in_plan_and_choice() -> None:
    plan = search_plan(TINY, arms(TINY), 4000)
    assert len(plan) == 22
    assert "runs/search/path_sgd-small-rate3e-05-seed1000" in plan
    assert plan["runs/search/natural-small-rate0.003-seed1000"].optimizer.learning_rate == 0.003
    full = search_plan(SIZES["full"], arms(SIZES["full"]), 60_000)
    assert len(full) == 22 * 7 * SIZES["full"].search_seeds
    rates = {run.optimizer.learning_rate for name, run in full.items() if "path_sgd-small" in name}
    assert sorted(rates) == pytest.approx([1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
    chosen = ((name, SIZES["full"].rates_of(name)[0]) for name in arms(SIZES["full"]))
    assert len(final_plan(SIZES["full"], arms(SIZES["full"]), chosen)) == 22 * 5


def test_a_study_without_own_rates_has_the_order_of_rates_seeds_arms() -> None:
    settings = ComparisonSettings(rates=(0.3, 0.1), search_seeds=2)
    names = list(search_plan(settings, {"b": next(iter(arms(TINY).values())), "a": arms(TINY)["natural-he"]}, 100))
    expected = [f"{a}-rate{r}-seed{s}" for r in ("0.3", "0.1") for s in (1000, 1001) for a in ("b", "a")]
    assert names == [f"runs/search/{name}" for name in expected]


@pytest.mark.parametrize("n", [2, 3, 6])
def test_the_interval_of_a_share_holds_what_a_paired_test_does_not_exclude(n: int) -> None:
    random.seed(n)
    found = 0
    for _ in range(20):
        wholes = [random.gauss(2.0, 0.1) for _ in range(n)]
        parts = [random.gauss(0.5, 0.3) * whole for whole in wholes]
        share = paired_share(parts, wholes)
        if share is None:
            assert estimate(wholes).low <= 0
            continue
        found += 1
        assert share.mean == pytest.approx(sum(parts) / sum(wholes), rel=1e-12)
        assert share.low <= share.mean <= share.high
        for end, outside in ((share.low, -1), (share.high, 1)):
            for shift, inside in ((-outside * 1e-3, True), (outside * 1e-3, False)):
                rest = estimate([a - (end + shift) * b for a, b in zip(parts, wholes, strict=True)])
                assert (rest.low <= 0 <= rest.high) is inside
    assert found > 3


def test_shares_that_have_no_interval_or_no_meaning() -> None:
    alone = paired_share([1.0], [4.0])
    assert alone is not None
    assert alone.mean == 0.25
    assert math.isnan(alone.low)
    assert paired_share([1.0], [-4.0]) is None
    assert paired_share([1.0, 1.0], [3.0, -2.0]) is None
    assert paired_share([1.0, 2.0], [-4.0, -4.1]) is None
    exact = paired_share([2.0, 2.2], [4.0, 4.4])
    assert exact is not None
    assert (exact.low, exact.high) == pytest.approx((0.5, 0.5), abs=1e-6)
    with pytest.raises(ValueError, match="2 parts and 1 wholes"):
        paired_share([1.0, 2.0], [2.0])


def test_shares_of_logarithms_of_steps() -> None:
    # From 400 to 100 steps is a factor of four; 200 is half of it, 50 one and a half, 800 minus a half.
    found = summary(
        weight_norm=(200, 240, 200),
        mean_only=(50, 60, 50),
        centered=(800, 960, 800),
        natural=(100, 130, 95),
        ghost=(40, 400, 150),
        population=(100, None, 100),
    )
    logs = found.starts["he"].shares
    assert [round(logs[name].mean, 6) for name in ("weight_norm", "mean_only", "centered")] == [0.5, 1.5, -0.5]
    rows, said = shares(found), verdicts(found)
    assert rows["weight_norm"] == "50 % (50 to 50)"
    assert said["weight_norm"] == "a part of it"
    assert said["mean_only"] == "more than batch norm"
    assert said["centered"] == "slower than the plain network"
    assert said["natural"] == "no clear difference to batch norm"
    assert said["ghost"] == "unclear, from nothing to all of it"
    assert rows["path_sgd"] == "0 % (0 to 0)"
    assert said["path_sgd"] == "no clear gain over the plain network"
    assert rows["population"] == "reached in 2 of 3 runs"
    assert "population" not in said
    assert rows["batch_norm"] == "100 %, by definition"
    against = verdict_table(found.starts["he"], "").rows[0]
    assert against[:2] == ["plain", "0.25 (0.25 to 0.25)"]


def test_the_answer_on_a_clear_gain() -> None:
    found = summary(weight_norm=(200, 240, 200), mean_only=(50, 60, 50), population=(100, None, 100))
    weights, said = answer(ONE, found)
    assert weights == (
        "Of batch norm's gain in training steps, arms that look at weights alone keep at best: from He's start 50 % "
        "(50 to 50), weight norm (a part of it)."
    )
    assert said == (
        "From He's start the plain network needs 427 steps to recognize 90 % of the test images and batch norm 107: "
        "4.0 times (4.0 to 4.0) fewer. Other arms keep at best, with statistics of earlier batches natural (PRONG) 0 % "
        "(0 to 0); with those of each batch weight norm + mean-only BN 150 % (150 to 150). Clearly fewer "
        "steps than batch norm: weight norm + mean-only BN; did not get there in every run: population BN (held)."
    )
    assert seconds("he", found.starts["he"]) == (
        "From He's start weight norm + mean-only BN is first at 90 % by the clock, after 0.11 seconds of one core, "
        "against the plain network 0.85 and batch norm 0.21."
    )
    assert ends(ONE, "he", found.starts["he"]).startswith(
        "After 1,000 steps from He's start the plain network recognizes 95.00 % (94.00 to 96.00) of the test images"
    )


def test_the_answer_without_a_gain_or_a_target() -> None:
    tie, loss = summary((400, 200, 800)), summary((800, 960, 820))
    assert "no clear gain (1.1 times (0.2 to 7.5) fewer), so that no arm has a share" in answer(ONE, tie)[1]
    assert "batch norm has no gain (0.5 times (0.5 to 0.5) fewer)" in answer(ONE, loss)[1]
    for found in (tie, loss):
        assert not found.starts["he"].shares
        assert answer(ONE, found)[0].endswith("from He's start batch norm has no clear gain.")
        assert shares(found)["ghost"] == "no gain to share"
        assert verdicts(found)["ghost"] == "–"
    never = summary((100, None, 100))
    assert never.starts["he"].target is None
    assert answer(ONE, never)[0].endswith("from He's start there is no accuracy to compare at.")
    assert answer(ONE, never)[1].startswith("From He's start no accuracy of 90 %, 95 %, 96 %, 97 % was reached by")
    assert shares(never)["ghost"] == "–"
    assert "no accuracy at which seconds" in seconds("he", never.starts["he"])


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    results = {name: result((200,), (400,)) for name in ARMS}
    results |= {"plain": result((400,), (400,)), "batch_norm": result((100,), (400,))}
    found = Summary({}, {}, {"he": compare(results)})
    weights, said = answer(ONE, found)
    assert weights.endswith("from He's start 50 %, weight norm (one seed, so without an interval).")
    assert "4.0 times fewer. Other arms keep at best, with" in said
    assert "One seed cannot say which arm needs clearly fewer steps than batch norm" in said
    assert shares(found)["ghost"] == "50 %"
    assert verdicts(found)["ghost"] == "one seed, so without an interval"
    assert "nan" not in said


def test_arms_that_diverged_are_named() -> None:
    found = summary(**{name: (None, None, None) for name in ARMS if name not in ("plain", "batch_norm")})
    weights, said = answer(ONE, found)
    assert weights.endswith("from He's start none got there in every run.")
    assert "fewer. Clearly fewer" in said
    assert "Clearly fewer steps than batch norm: no arm; did not get there in every run: weight norm, centered" in said
    assert shares(found)["standardized"] == "reached in 0 of 3 runs"
    assert list(verdicts(found)) == ["plain"]


def test_the_search_says_where_it_is_open() -> None:
    chosen = dict.fromkeys(arms(ONE), 0.03) | {"natural-he": 0.0001, "batch_norm-he": 1.0, "path_sgd-he": 1.0}
    found = dataclasses.replace(summary(), chosen=chosen)
    assert search_note(ONE, found) == (
        "batch norm from He's start; Path-SGD from He's start: the best rate is the largest tried, so a better one may "
        "lie beyond. natural (PRONG) from He's start: the best rate is the smallest tried, so a better one may lie "
        "beyond."
    )
    closed = dataclasses.replace(found, chosen=dict.fromkeys(chosen, 0.03))
    assert search_note(ONE, closed).startswith("For every arm the best rate lies between")


def test_a_figure_of_shares_has_both_starts_and_leaves_out_what_is_missing() -> None:
    one = {"a": Estimate(0.5, 0.3, 0.7, 5), "b": Estimate(-4.0, math.nan, math.nan, 1)}
    groups = {"first": one, "second": {"b": Estimate(1.5, 1.2, 1.9, 5)}}
    svg = interval_rows(
        "rows", groups, ["a", "b", "c"], x_label="share", levels={"none": 0.0, "all": 1.0}, description="two starts"
    )
    for text in ("first", "second", ">a<", ">b<", ">c<", "none", "all", "<title>two starts"):
        assert text in svg
    assert "nan" not in svg.lower()


def test_verdicts_follow_the_interval() -> None:
    def said(low: float, high: float) -> str:
        return verdict(Estimate((low + high) / 2, low, high, 5))

    assert said(0.2, 0.8) == "a part of it"
    assert said(-0.2, 0.8) == "no clear gain over the plain network"
    assert said(0.2, 1.8) == "no clear difference to batch norm"
    assert kept(Estimate(-0.504, -1.2, 0.2, 5)) == "-50 % (-120 to 20)"


@pytest.mark.parametrize(
    "wrong",
    [{"starts": ()}, {"starts": ("xavier",)}, {"starts": ("he", "he")}, {"small_std": 0.0}, {"targets": (1.5,)}],
    ids=str,
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        dataclasses.replace(TINY, **wrong)
