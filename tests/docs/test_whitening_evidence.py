"""Every number that the page of the study whitening quotes comes out of the committed records."""

import json
import math
import re
from pathlib import Path

import pytest

from batchlab.lab.report import Table
from batchlab.lab.studies.arm_results import accuracy_table, steps_table
from batchlab.lab.studies.comparison_study import read_finished
from batchlab.lab.studies.stages import to_json
from batchlab.lab.studies.whitening import COMPARISON
from batchlab.lab.studies.whitening.page import verdict_table
from batchlab.lab.studies.whitening.settings import ARMS
from tests.docs.search_rows import search_rows

FOLDER = Path(__file__).parents[2] / "experiments" / "whitening"


def rows(table: Table) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in table.rows]


def test_the_page_says_what_the_records_say() -> None:
    finished = read_finished(COMPARISON, FOLDER)
    summary = COMPARISON.summarize(finished)
    assert finished.settings == COMPARISON.sizes["full"]
    assert finished.training_images == 60_000
    assert json.loads((FOLDER / "summary.json").read_text()) == to_json(summary)
    text = re.sub(r"\s+", " ", (FOLDER / "README.md").read_text())
    quoted = [
        *COMPARISON.ending(finished, summary)[2],
        *rows(steps_table(summary.results, ARMS, "")),
        *rows(steps_table(summary.results, ARMS, "", seconds=True)),
        *rows(accuracy_table(summary.results, ARMS, summary.chosen, "")),
        *rows(verdict_table(summary, "")),
        *rows(verdict_table(summary, "", seconds=True)),
        *search_rows(finished.settings.rates, finished.scores, finished.chosen, ARMS),
    ]
    assert not [words for words in quoted if words not in text]
    commits = {record.environment["commit"] for record in finished.records.values()}
    assert not any(commit.endswith("+") for commit in commits)


def test_seconds_counted_by_hand() -> None:
    def seconds(arm: str, seed: int) -> float:
        (folder,) = (FOLDER / "runs" / "final").glob(f"{arm}-rate*-seed{seed}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps: int = next(line["step"] for line in lines if line["accuracy"] >= 0.97)
        pace = json.loads((folder / "timing.json").read_text())["processor_seconds"] / 5000
        return float(steps * pace)

    logs = [math.log(seconds("batch_norm", seed) / seconds("whitening_16", seed)) for seed in range(5)]
    found = COMPARISON.summarize(read_finished(COMPARISON, FOLDER)).seconds_than_batch_norm["whitening_16"]
    assert found.mean == pytest.approx(math.exp(sum(logs) / 5), rel=1e-12)


def test_the_verdicts_quote_the_numbers() -> None:
    finished = read_finished(COMPARISON, FOLDER)
    summary = COMPARISON.summarize(finished)
    text = re.sub(r"\s+", " ", (FOLDER / "README.md").read_text())
    than = summary.than_batch_norm
    for name, words in {
        "whitening_16": "groups of 16: {} times fewer steps",
        "mean_only": "centering alone takes {}",
        "variance_only": "rescaling alone {} times fewer",
    }.items():
        found = than[name]
        assert words.format(f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})") in text
    none = than["none"]
    assert f"{1 / none.mean:.2f} ({1 / none.high:.2f} to {1 / none.low:.2f}) times fewer steps than none" in text
    pace = {name: 1000 * (result.seconds_per_step or 0) for name, result in summary.results.items()}
    assert f"{pace['whitening']:.2g} ms a step for all channels" in text
    assert f"{pace['batch_norm']:.2g} ms for batch norm, {pace['none']:.2g} ms for none" in text
    assert f"{pace['newton_64']:.2g} against {pace['whitening_64']:.2g} ms a step" in text
    dearer = [pace[name] / pace["batch_norm"] for name in ("whitening_16", "whitening_64", "newton_64", "whitening")]
    assert round(min(dearer)) == 2
    assert 4 <= max(dearer) < 4.6
