"""The study of covariate shift end to end on a size of seconds, and its numbers and sentences worked out by hand."""

import dataclasses
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from batchlab.lab.comparison import Estimate, StepsToTarget
from batchlab.lab.data import load_embedded
from batchlab.lab.records import RunRecord
from batchlab.lab.settings import OptimizerSettings, RunSettings, SettingsError
from batchlab.lab.studies import STUDIES
from batchlab.lab.studies.arm_results import ArmResult
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.search import run_name, search_plan
from batchlab.lab.studies.why import COMPARISON, arms
from batchlab.lab.studies.why.answer import answer, compared, number, ratio_text, verdict_table
from batchlab.lab.studies.why.figures import figures
from batchlab.lab.studies.why.measures import MEASURES, WINDOWS, of_line, of_run, window
from batchlab.lab.studies.why.page import build_page, layer_table, measure_table, time_table
from batchlab.lab.studies.why.settings import ARMS, NETWORKS, NORMALIZATIONS, WhySettings
from batchlab.lab.studies.why.summary import Measured, Summary, further_pairs, summarize
from batchlab.lab.study import Workplace

TINY = WhySettings(
    steps=20,
    seeds=2,
    rates=(0.1, 0.3),
    search_steps=5,
    search_seeds=1,
    widths=(8, 6),
    relu_widths=(8, 6),
    batch_size=50,
    spacing=1.0,
    losses=(2.6, 0.5),
    targets=(0.11, 0.99),
)
SMALLER, LARGER, UNCLEAR = Estimate(0.5, 0.4, 0.6, 2), Estimate(2.0, 1.5, 2.5, 2), Estimate(1.1, 0.8, 1.4, 2)
LAST_STEPS = "... and training is still faster than without normalization"
ONE_SEED = Estimate(0.7, math.nan, math.nan, 1)


def test_the_study_leaves_records_figures_and_a_report(tmp_path: Path) -> None:
    study, console = STUDIES["why"], Console(record=True, width=200)
    one_seed = dataclasses.replace(TINY, seeds=1)  # the case in which no interval exists
    page = study.run(one_seed, Workplace(tmp_path / "out", load_embedded(), None, 2, console))
    first = {p.name: p.read_bytes() for p in page.parent.glob("*.*")}
    found = json.loads((page.parent / "summary.json").read_text())
    assert set(found["chosen"]) == set(ARMS)
    assert set(found["parts"]) == set(NETWORKS)
    assert set(found["parts"]["relu"]["common"]) == set(WINDOWS)
    drawn = {p.stem for p in (page.parent / "figures").iterdir()}
    assert drawn == {"accuracy", "rate-search"} | {
        f"{name}-{network}"
        for name in ("shift-own", "shift-common", "gradients-own", "gradients-common", "smoothness-own")
        for network in NETWORKS
    }
    text = page.read_text()
    assert "The test images had no part in it" in text
    assert "nan" not in text.lower().replace("finan", "")
    study.report(page.parent, console)
    assert {p.name: p.read_bytes() for p in page.parent.glob("*.*")} == first
    searched = json.loads(next((page.parent / "runs/search").glob("*/metrics.jsonl")).read_text().splitlines()[0])
    assert "landscape" not in searched


def test_the_search_measures_nothing() -> None:
    plan = search_plan(TINY, arms(TINY), 4000)
    assert not any(run.landscape for run in plan.values())
    assert all(run.landscape for run in arms(TINY).values())


def test_the_control_trains_all_arms_at_the_rate_of_the_network_without_normalization() -> None:
    chosen = dict.fromkeys(ARMS, 0.1) | {"sigmoid-none": 0.3, "sigmoid-batch_norm": 0.3, "relu-batch_norm": 1.0}
    assert further_pairs(chosen) == [("sigmoid-noisy_batch_norm", 0.3), ("relu-batch_norm", 0.1)]
    names = list(COMPARISON.final_plan(TINY, chosen))
    assert run_name("final", "relu-batch_norm", 0.1, 1) in names
    assert run_name("final", "relu-batch_norm", 1.0, 0) in names
    assert len(names) == len(set(names)) == (len(ARMS) + 2) * TINY.seeds


def line(step: int, train_loss: float | None, scale: float = 1.0, noisy: bool = False) -> dict[str, Any]:
    """Gradients of norm 2 and 8 that shift by `scale` and 16 times `scale`."""
    shift: dict[str, Any] = {
        "gradient": [2.0, 8.0],
        "shift": [scale, 16 * scale],
        "cosine": [0.5, 0.9],
        "moved": [scale, 4 * scale],
    }
    if noisy:
        shift["anew"] = {"shift": [2 * scale, 32 * scale], "cosine": [0.1, 0.3], "moved": [9 * scale, 9 * scale]}
    along = {"loss": 1.0, "norm": 4.0, "losses": [0.7, 0.5, 0.9], "changes": [scale, 3 * scale], "smoothness": scale}
    accuracy = {"accuracy": 0.9 if step > 10 else 0.1, "loss": 1.0}
    return {"step": step, "train_loss": train_loss, **accuracy, "landscape": {"shift": shift, "along": along}}


def test_measures_are_as_worked_out_by_hand() -> None:
    expected = {
        "relative_shift": 1.0,  # √(1/2 · 16/8)
        "shift": 4.0,
        "turn": 0.3,
        "moved": 2.0,
        "relative_shift_anew": 2.0,
        "moved_anew": 9.0,
        "loss_range": 0.4,
        "change": 3.0,
        "relative_change": 0.75,
        "smoothness": 1.0,
    }
    assert set(expected) == set(MEASURES)
    for measure, value in expected.items():
        assert of_line(line(1, 1.0, noisy=True), measure) == pytest.approx(value)
    assert of_line(line(1, 1.0), "relative_shift_anew") == pytest.approx(1.0)
    assert of_line(line(1, 1.0), "moved_anew") == pytest.approx(2.0)
    assert of_run([line(1, 1.0, 1.0), line(2, 1.0, 4.0)], "smoothness") == pytest.approx(2.0)
    assert math.isnan(of_run([], "smoothness"))


def test_what_was_not_finite_is_left_out() -> None:
    broken = line(1, 1.0)
    broken["landscape"]["along"] |= {"losses": [None, 1.0], "changes": [1.0, None], "smoothness": None}
    broken["landscape"]["shift"]["gradient"] = [0.0, 8.0]
    for measure in ("loss_range", "change", "relative_change", "smoothness", "relative_shift"):
        assert math.isnan(of_line(broken, measure))
        assert of_run([broken, line(2, 1.0)], measure) == of_run([line(2, 1.0)], measure)


def record(arm: str, seed: int, scale: float, diverged: bool = False, noisy: bool = False) -> RunRecord:
    settings = RunSettings(seed=seed, steps=40, optimizer=OptimizerSettings(0.1), probe_units=0)
    lines = [line(0, None), *(line(step, 4.0 / step, scale, noisy) for step in (2, 4, 16, 30, 40))]
    metrics = lines[:2] if diverged else lines
    result = {"status": "diverged" if diverged else "finished", "steps": 40}
    environment = {"batchlab": "1", "torch": "2", "python": "3", "processor": "one", "commit": "abc"}
    return RunRecord(arm, settings, {}, environment, metrics, result, {})


def finished(scales: dict[str, tuple[float, ...]], diverged: tuple[str, ...] = (), seeds: int = 2) -> Finished:
    """Two seeds of each arm at one rate; "arm-seed" in `diverged` ended early."""
    settings = dataclasses.replace(TINY, seeds=seeds, rates=(0.1,), losses=(1.5, 0.2), targets=(0.5, 0.95))
    records = {
        run_name("final", arm, 0.1, seed): record(
            arm,
            seed,
            scales.get(arm, (1.0,) * seeds)[seed],
            arm in diverged or f"{arm}-{seed}" in diverged,
            "noisy" in arm,
        )
        for arm in ARMS
        for seed in range(seeds)
    }
    data = {"training_images": 60_000, "description": "made up"}
    scores = {arm: {0.1: [0.0 if arm in diverged else 0.5]} for arm in ARMS}
    return Finished(settings, data, records, dict.fromkeys(ARMS, 0.1), scores)


def test_windows_are_parts_of_training() -> None:
    found = record("x", 0, 1.0)
    steps = {name: [line["step"] for line in window(found, name, (1.5, 0.2))] for name in WINDOWS}
    assert steps == {"start": [], "early": [2, 4], "late": [30, 40], "same loss": [4, 16]}
    longer = dataclasses.replace(found, settings=dataclasses.replace(found.settings, steps=400))
    assert [line["step"] for line in window(longer, "start", (1.5, 0.2))] == [2, 4]


def test_ratios_are_paired_by_seed() -> None:
    summary = summarize(finished({"relu-none": (1.0, 2.0), "relu-batch_norm": (0.5, 1.0)}))
    assert summary.parts["relu"]["own"]["start"] == {name: {} for name in NORMALIZATIONS}  # nothing measured there
    for name in WINDOWS[1:]:
        found = summary.parts["relu"]["own"][name]
        assert found["none"]["relative_shift"] == Measured(pytest.approx(math.sqrt(2)), None)
        ratio = found["batch_norm"]["relative_shift"].ratio
        assert ratio is not None
        assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
        turn = found["batch_norm"]["turn"].ratio
        assert turn is not None
        assert turn.mean == pytest.approx(1.0)
        anew = found["noisy_batch_norm"]["relative_shift_anew"].ratio
        assert anew is not None
        assert anew.mean == pytest.approx(math.sqrt(2))  # 2 over 1, and 2 over 2
    for ratio in summary.layers["relu"]["batch_norm"]:
        assert ratio is not None
        assert ratio.mean == pytest.approx(0.5)
    assert summary.targets == {"sigmoid": 0.5, "relu": 0.5}


def test_runs_that_diverged_are_left_out_and_never_crash() -> None:
    one = summarize(finished({"relu-batch_norm": (0.5, 3.0)}, ("relu-batch_norm-1",)))
    ratio = one.parts["relu"]["own"]["late"]["batch_norm"]["smoothness"].ratio
    assert ratio is not None
    assert (ratio.mean, ratio.n) == (pytest.approx(0.5), 1)
    assert one.targets == {"sigmoid": 0.5, "relu": None}
    everything = ("relu-none", "sigmoid-batch_norm", "relu-noisy_batch_norm")
    for gone in (everything, *((arm,) for arm in everything)):
        found = finished({}, gone)
        summary = summarize(found)
        drawn = figures(found, summary) if gone == everything else defaultdict(str)
        page = build_page(found, summary, "batchlab study why", drawn)
        words = " ".join(page.answer)
        assert "not measured" in words
        assert "nan" not in words
        assert "network, none that every run reached" in words


def summary(shift: Estimate, anew: Estimate, fewer: Estimate, rest: Estimate = UNCLEAR) -> Summary:
    def result(steps: tuple[int, ...], ratio: Estimate | None) -> ArmResult:
        row = StepsToTarget(0.5, (200, 400), steps, ratio)
        gain = None if ratio is None else Estimate(0.01, 0.0, 0.02, 2)
        return ArmResult(Estimate(0.9, 0.8, 1.0, 2), gain, (row,), 0.001)

    def part(ratio: dict[str, Estimate]) -> dict[str, Measured]:
        return {measure: Measured(1.5, ratio.get(measure, rest)) for measure in MEASURES}

    found = {
        "none": {measure: Measured(2.0, None) for measure in MEASURES},
        "batch_norm": part({"relative_shift": shift}),
        "noisy_batch_norm": part({"relative_shift_anew": anew}),
    }
    results = {
        network: {
            f"{network}-none": result((200, 400), None),
            f"{network}-batch_norm": result((100, 200), Estimate(2.0, 1.9, 2.1, 2)),
            f"{network}-noisy_batch_norm": result((150, 250), fewer),
        }
        for network in NETWORKS
    }
    parts = {network: {rates: dict.fromkeys(WINDOWS, found) for rates in ("own", "common")} for network in NETWORKS}
    layers = {network: {name: [shift, None] for name in NORMALIZATIONS if name != "none"} for network in NETWORKS}
    return Summary(dict.fromkeys(ARMS, 0.1), {}, results, dict.fromkeys(NETWORKS, 0.5), parts, layers)


def test_sentences_say_what_the_numbers_say() -> None:
    first, time, noise, along = answer(TINY, summary(SMALLER, LARGER, LARGER, SMALLER))
    assert "In the sigmoid network: yes, 0.50 (0.40 to 0.60) times as much as without normalization. In the" in first
    assert "between 2.6 and 0.5" in first
    assert time.startswith(
        "In the first hundredth of training: sigmoid network smaller (0.50 times, 0.40 to 0.60); ReLU network "
    )
    assert "In the second half: sigmoid network smaller" in time
    assert "no normalization: sigmoid network larger (2.0 times, 1.5 to 2.5)" in noise
    assert "sigmoid network, 50 %, after 300 (none), 150 (batch norm), 200 (noisy batch norm)" in noise
    assert "Clearly more shift than without normalization, and yet clearly fewer steps: sigmoid network, " in noise
    assert "sigmoid network, 2.0 (1.5 to 2.5) times fewer to 50 %; ReLU network, 2.0" in noise
    assert "with batch norm: sigmoid network smaller (0.50 times, 0.40 to 0.60)" in along

    first, _, noise, _ = answer(TINY, summary(LARGER, SMALLER, LARGER))
    assert "In the ReLU network: no, 2.0 (1.5 to 2.5) times as much as without normalization." in first
    assert "In neither network does noisy batch norm have clearly more shift and clearly fewer steps" in noise

    first, _, noise, along = answer(TINY, summary(UNCLEAR, LARGER, UNCLEAR))
    assert "In the sigmoid network: no clear difference, 1.1 (0.80 to 1.4) times as much" in first
    assert "not clearly different (1.1 times, 0.80 to 1.4)" in along
    assert "In neither network" in noise

    sentences = answer(TINY, summary(ONE_SEED, ONE_SEED, ONE_SEED, ONE_SEED))
    assert "one seed cannot tell, 0.70 times as much" in sentences[0]
    assert "0.70 times (one seed, so without an interval)" in sentences[3]
    assert "In neither network" in sentences[2]
    assert "nan" not in " ".join(sentences)


def test_tables_put_the_paper_beside_what_was_found() -> None:
    found = summary(SMALLER, LARGER, LARGER)
    rows = dict(verdict_table(found, "").rows)
    assert "sigmoid network smaller (0.50 times, 0.40 to 0.60)" in rows[next(iter(rows))]
    faster = rows[LAST_STEPS]
    assert "ReLU network 2.0 (1.5 to 2.5) times fewer steps to 50 % (faster)" in faster
    for ratio, word in ((Estimate(0.5, 0.4, 0.6, 2), "slower"), (UNCLEAR, "not clear"), (ONE_SEED, "one seed")):
        text = dict(verdict_table(summary(SMALLER, LARGER, ratio), "").rows)
        assert word in text[LAST_STEPS]
    for results in found.results.values():
        for name, result in results.items():
            never = dataclasses.replace(result.steps[0], other=(100, None))
            results[name] = dataclasses.replace(result, steps=(never,))
    assert "sigmoid network has no target that every run" in dict(verdict_table(found, "").rows)[LAST_STEPS]
    row = measure_table(found, "relu", "common", "").rows[0]
    assert row == [MEASURES["relative_shift"], "2.0", "1.5", "0.50 (0.40 to 0.60)", "1.5", "1.1 (0.80 to 1.4)"]
    assert time_table(found, "relu", "own", "").rows[0][1] == "0.50 (0.40 to 0.60)"
    assert [row[0] for row in layer_table(found, "relu", "").rows] == ["layer 2", "layer 3"]
    assert layer_table(found, "relu", "").rows[1] == ["layer 3", "–", "–"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.50"), (1.0, "1.0"), (12.34, "12"), (1234.0, "1,234"), (0.0123, "0.012")]
)
def test_numbers_have_two_digits(value: float, text: str) -> None:
    assert number(value) == text
    assert ratio_text(Estimate(value, math.nan, math.nan, 1)) == text


def test_a_measure_that_is_missing_is_said_to_be() -> None:
    assert compared(None) == "not measured"
    assert ratio_text(None) == "–"


def test_a_rate_at_the_edge_of_the_search_is_said() -> None:
    found = finished({})
    edge = build_page(found, summarize(found), "", defaultdict(str))
    text = " ".join(getattr(block, "caption", "") for section in edge.sections for block in section.blocks)
    assert "At the edge of what was tried, so a better rate may lie outside: sigmoid, none;" in text


@pytest.mark.parametrize(
    "wrong", [{"losses": (0.1, 0.5)}, {"losses": (0.5, 0.0)}, {"targets": (1.5,)}, {"dataset": "cifar"}], ids=str
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"losses|targets"):
        dataclasses.replace(TINY, **(wrong if "dataset" not in wrong else wrong | {"targets": ()}))
