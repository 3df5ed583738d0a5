"""Every number that the page on learning rates quotes comes out of the committed records."""

import json
import re
from pathlib import Path

import pytest

from batchlab.lab.report import Table
from batchlab.lab.studies.comparison_study import Finished, read_finished
from batchlab.lab.studies.learning_rates import COMPARISON
from batchlab.lab.studies.learning_rates.answer import answer, open_ends
from batchlab.lab.studies.learning_rates.page import (
    accuracy_table,
    best_table,
    goal_table,
    growth_table,
    range_table,
    verdict_table,
)
from batchlab.lab.studies.learning_rates.settings import SCALE_FREE
from batchlab.lab.studies.learning_rates.summary import Summary
from batchlab.lab.studies.search import run_name, search_plan
from batchlab.lab.studies.stages import to_json

FOLDER = Path(__file__).parents[2] / "experiments" / "learning-rates"


@pytest.fixture(scope="module")
def finished() -> Finished:
    return read_finished(COMPARISON, FOLDER)


@pytest.fixture(scope="module")
def summary(finished: Finished) -> Summary:
    found: Summary = COMPARISON.summarize(finished)
    return found


@pytest.fixture(scope="module")
def page() -> str:
    return re.sub(r"\s+", " ", (FOLDER / "README.md").read_text())


def rows(table: Table) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in table.rows]


def test_the_committed_study_is_the_full_one_on_all_of_mnist(finished: Finished, summary: Summary) -> None:
    assert finished.settings == COMPARISON.sizes["full"]
    assert finished.training_images == 60_000
    assert json.loads((FOLDER / "summary.json").read_text()) == to_json(summary)
    commits = {record.environment["commit"] for record in finished.records.values()}
    assert len(commits) == 1
    assert not commits.pop().endswith("+")


def test_the_page_says_what_the_records_say(finished: Finished, summary: Summary, page: str) -> None:
    settings = finished.settings
    sentences = [*answer(settings, summary), open_ends(settings, summary)]
    for sentence in filter(None, sentences):
        assert sentence in page
    lines = [*rows(verdict_table(settings, summary, "")), *rows(goal_table(settings, summary, ""))]
    for condition in summary.conditions.values():
        lines += rows(range_table(settings, condition, ""))
        lines += rows(accuracy_table(settings, condition, ""))
        lines += rows(best_table(condition, ""))
        lines += rows(growth_table(condition, ""))
    for line in lines:
        assert line in page


def test_the_page_counts_runs_and_minutes_as_the_records_do(finished: Finished, page: str) -> None:
    plan = search_plan(finished.settings, COMPARISON.arms(finished.settings), finished.training_images)
    minutes = sum(record.timing["processor_seconds"] for record in finished.records.values()) / 60
    assert f"{len(plan)} runs of {finished.settings.search_steps} steps" in page
    assert f"{len(finished.records) - len(plan)} more, {finished.settings.seeds} other seeds" in page
    assert f"{minutes:.0f} minutes of processor time" in page


def test_what_the_page_says_of_weights_and_losses_is_recorded(finished: Finished, summary: Summary, page: str) -> None:
    relu = summary.conditions["relu"]
    free = {
        name: (found.highest, found.highest / relu.growth[name][found.highest] ** 2)
        for name, found in relu.limits.items()
        if name.split("_", 1)[1] in SCALE_FREE and found.highest and found.highest >= 0.2
    }
    left = [value for _, value in free.values()]
    assert len(free) == 6
    assert {rate for rate, _ in free.values()} <= {0.2, 0.5, 1.0, 2.0}
    assert f"largest rates of 0.2 to 2 with {min(left):.2g} to {max(left):.2g} left of it" in page
    names = [run_name("search", "relu_batch_norm", 2.0, seed) for seed in finished.settings.seeds_of_search]
    last = [finished.records[name].metrics[-1] for name in names]
    spans = [sorted(f"{line[key]:.2f}" for line in last) for key in ("train_loss", "loss")]
    assert (
        f"training loss of {spans[0][0]} to {spans[0][-1]} over the last 100 steps, "
        f"and one of {spans[1][0]} to {spans[1][-1]} on held-out images" in page
    )


def test_the_verdicts_hold(summary: Summary) -> None:
    relu, sigmoid = summary.conditions["relu"], summary.conditions["sigmoid"]
    assert relu.chosen["relu_none"] == relu.chosen["relu_batch_norm"]
    assert relu.at_baseline["relu_batch_norm"].low > 0
    for found in (relu.largest["relu_weight_norm"], sigmoid.largest["sigmoid_weight_norm"]):
        assert not found.larger
        assert not found.smaller
    assert sum(score >= 0.9 for score in relu.scores["relu_weight_norm"][0.5]) == 4
    assert min(relu.scores["relu_weight_norm"][0.5]) < 0.2
    assert sum(score < 0.9 for score in sigmoid.scores["sigmoid_none"][0.5]) == 2
    assert sum(score < 0.9 for score in sigmoid.scores["sigmoid_batch_norm"][2.0]) == 1
    assert relu.than_batch_norm["relu_centered"].larger
    assert relu.than_batch_norm["relu_weight_norm"].smaller
    assert max(sigmoid.scores["sigmoid_none"][1.0]) < 0.4
    assert sigmoid.than_batch_norm["sigmoid_centered"].low < 1 < (sigmoid.than_batch_norm["sigmoid_centered"].high or 9)
    assert sigmoid.chosen["sigmoid_none"] < sigmoid.chosen["sigmoid_batch_norm"]
    assert sigmoid.at_baseline["sigmoid_batch_norm"].low < 0 < sigmoid.at_baseline["sigmoid_batch_norm"].high
    assert [round(relu.largest["relu_batch_norm"].factor), round(sigmoid.at_goals[0.8].factor)] == [5, 4]
    assert round(sigmoid.largest["sigmoid_batch_norm"].factor) == 5
    assert relu.largest["relu_mean_only"].smaller
    assert sigmoid.largest["sigmoid_mean_only"].larger
    assert not relu.largest["relu_variance_only"].larger
    assert not sigmoid.largest["sigmoid_variance_only"].larger
    assert min(relu.largest, key=lambda name: relu.largest[name].factor) == "relu_standardization"
    assert relu.limits["relu_population"].lowest is None
    # Nearly two powers of ten within about a point of the best: 0.01 to 0.5.
    means = {rate: sum(scores) / len(scores) for rate, scores in relu.scores["relu_batch_norm"].items()}
    assert all(max(means.values()) - means[rate] < 0.01 for rate in means if 0.01 <= rate <= 0.5)
    larger = {name: rate for name, rate in relu.chosen.items() if rate > relu.chosen["relu_none"]}
    assert larger == {"relu_weight_norm": 0.1, "relu_centered": 0.1, "relu_whitening": 0.2}
    # Thirty times the baseline's best rate is between two rates tried: 33 times trains; sigmoid: 5 times does, 25 not.
    assert relu.limits["relu_batch_norm"].highest == 1.0
    assert relu.chosen["relu_none"] == 0.03
    assert sigmoid.limits["sigmoid_batch_norm"].highest == 1.0
    assert sigmoid.chosen["sigmoid_none"] == 0.2
    assert all(max(relu.scores["relu_none"][rate]) < 0.2 for rate in (0.5, 1.0))
