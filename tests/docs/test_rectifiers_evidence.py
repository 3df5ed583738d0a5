"""Every number that the page on rectifiers quotes comes out of the committed records."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from batchlab.lab.studies.comparison_study import Finished, read_finished
from batchlab.lab.studies.rectifiers import COMPARISON, page
from batchlab.lab.studies.rectifiers.answer import closing
from batchlab.lab.studies.stages import to_json

FOLDER = Path(__file__).parents[2] / "experiments" / "rectifiers"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "summary.json").is_file(), reason="the study is under way: it has no summary yet"
)
TABLES = (
    page.accuracy_table,
    page.rate_table,
    page.slope_table,
    page.start_table,
    page.steps_table,
    page.verdict_table,
)


@pytest.fixture(scope="module")
def finished() -> Finished:
    return read_finished(COMPARISON, FOLDER)


@pytest.fixture(scope="module")
def summary(finished: Finished) -> Any:
    return COMPARISON.summarize(finished)


@pytest.fixture(scope="module")
def text() -> str:
    return re.sub(r"\s+", " ", (FOLDER / "README.md").read_text())


def test_the_committed_study_is_the_full_one_on_all_of_mnist(finished: Finished, summary: Any) -> None:
    assert finished.settings == COMPARISON.sizes["full"]
    assert finished.training_images == 60_000
    assert json.loads((FOLDER / "summary.json").read_text()) == to_json(summary)
    commits = {record.environment["commit"] for record in finished.records.values()}
    assert len(commits) == 1
    assert not commits.pop().endswith("+")


def test_the_page_quotes_the_answer(finished: Finished, summary: Any, text: str) -> None:
    for sentence in [*COMPARISON.ending(finished, summary)[2], closing(summary)]:
        assert sentence in text
    assert f"{summary.seconds / 60:.0f} minutes of processor time" in text


@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table.__name__))
def test_the_page_quotes_the_tables(table: Any, finished: Finished, summary: Any, text: str) -> None:
    for row in table(finished.settings, summary, "").rows:
        assert f"| {' | '.join(row)} |" in text
