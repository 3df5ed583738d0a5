"""Every sentence, table and verdict of the page on covariate shift comes out of the committed records."""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from batchlab.lab.report import Table
from batchlab.lab.studies.arm_results import accuracy_table, steps_table
from batchlab.lab.studies.comparison_study import Finished, read_finished
from batchlab.lab.studies.stages import to_json
from batchlab.lab.studies.why import COMPARISON
from batchlab.lab.studies.why.answer import verdict_table
from batchlab.lab.studies.why.measures import window
from batchlab.lab.studies.why.page import layer_table, measure_table, time_table
from batchlab.lab.studies.why.settings import ARMS, NETWORKS
from batchlab.lab.studies.why.summary import RATES, Summary
from tests.docs.search_rows import search_rows

FOLDER = Path(__file__).parents[2] / "experiments" / "why"


@pytest.fixture(scope="module")
def finished() -> Finished:
    return read_finished(COMPARISON, FOLDER)


@pytest.fixture(scope="module")
def summary(finished: Finished) -> Summary:
    found: Summary = COMPARISON.summarize(finished)
    return found


@pytest.fixture(scope="module")
def text() -> str:
    return re.sub(r"\s+", " ", (FOLDER / "README.md").read_text())


def along(finished: Finished, arm: str) -> list[dict[str, Any]]:
    """What was met along the gradient at the same training loss, at the rate of the network without normalization."""
    rate = finished.chosen[f"{arm.split('-')[0]}-none"]
    lines = [line for run in finished.runs(arm, rate) for line in window(run, "same loss", finished.settings.losses)]
    return [line["landscape"]["along"] for line in lines]


def fallen(finished: Finished, arm: str) -> float:
    """By which share of itself the loss falls at four times the gradient step, on average."""
    return fmean(1 - found["losses"][-1] / found["loss"] for found in along(finished, arm))


def rows(table: Table) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in table.rows]


def test_the_records_are_the_full_study_on_all_of_mnist(finished: Finished, summary: Summary) -> None:
    assert finished.settings == COMPARISON.sizes["full"]
    assert finished.training_images == 60_000
    assert json.loads((FOLDER / "summary.json").read_text()) == to_json(summary)
    commits = {record.environment["commit"] for record in finished.records.values()}
    assert not any(commit.endswith("+") for commit in commits)


def test_the_page_quotes_the_answer(finished: Finished, summary: Summary, text: str) -> None:
    for sentence in COMPARISON.ending(finished, summary)[2]:
        assert sentence in text


def test_the_page_quotes_the_tables(finished: Finished, summary: Summary, text: str) -> None:
    results = {arm: result for found in summary.results.values() for arm, result in found.items()}
    quoted = [
        *rows(verdict_table(summary, "")),
        *rows(steps_table(results, ARMS, "")),
        *rows(accuracy_table(results, ARMS, summary.chosen, "")),
        *search_rows(finished.settings.rates, finished.scores, finished.chosen, ARMS),
    ]
    for network in NETWORKS:
        quoted += [*rows(time_table(summary, network, "own", "")), *rows(layer_table(summary, network, ""))]
        for rates in RATES:
            quoted += rows(measure_table(summary, network, rates, ""))
    for row in quoted:
        assert row in text


def test_the_page_quotes_how_far_the_loss_falls(finished: Finished, text: str) -> None:
    norm, none = (fallen(finished, f"sigmoid-{name}") for name in ("batch_norm", "none"))
    assert f"all at one rate, by {100 * norm:.0f} % of itself, and without normalization by {100 * none:.0f} %." in text
    for arm in ARMS:
        risen = [max(found["losses"]) > found["loss"] for found in along(finished, arm)]
        assert sum(risen) < 0.02 * len(risen)


def test_the_report_is_the_one_that_the_records_give(finished: Finished) -> None:
    report = (FOLDER / "report.html").read_text()
    for name in ("shift-own-sigmoid", "gradients-common-relu"):
        assert (FOLDER / "figures" / f"{name}.svg").is_file()
    assert COMPARISON.ending(finished, COMPARISON.summarize(finished))[2][0] in report.replace("&#39;", "'")
