"""Every number that the page of dropout-or-bn quotes comes out of its committed records."""

import json
import re
from pathlib import Path

import pytest

from batchlab.lab.report import Table
from batchlab.lab.studies.comparison_study import read_finished
from batchlab.lab.studies.dropout_or_bn import COMPARISON
from batchlab.lab.studies.dropout_or_bn.answer import answer, details, edge_sentence
from batchlab.lab.studies.dropout_or_bn.arms import named_arms
from batchlab.lab.studies.dropout_or_bn.page import error_table, pace_tables, shift_table, verdict_table
from batchlab.lab.studies.stages import to_json
from tests.docs.search_rows import search_rows

FOLDER = Path(__file__).parents[2] / "experiments" / "dropout-or-bn"


def rows(table: Table) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in table.rows]


@pytest.mark.skipif(not (FOLDER / "summary.json").is_file(), reason="the study is under way: it has no summary yet")
def test_the_page_says_what_the_records_say() -> None:
    finished = read_finished(COMPARISON, FOLDER)
    settings, summary = finished.settings, COMPARISON.summarize(finished)
    assert settings == COMPARISON.sizes["full"]
    assert finished.training_images == 60_000
    assert json.loads((FOLDER / "summary.json").read_text()) == to_json(summary)
    text = re.sub(r"\s+", " ", (FOLDER / "README.md").read_text())
    for sentence in [*answer(settings, summary), *details(settings, summary), edge_sentence(settings, summary)]:
        assert sentence in text
    tables = [error_table(settings, summary, ""), shift_table(settings, summary, "")]
    tables += [verdict_table(settings, summary, ""), *pace_tables(settings, summary, ("", ""))]
    for table in tables:
        for row in rows(table):
            assert row in text
    for row in search_rows(settings.rates, finished.scores, finished.chosen, named_arms(settings)):
        assert row in text
    commits = {record.environment["commit"] for record in finished.records.values()}
    assert not any(commit.endswith("+") for commit in commits)
