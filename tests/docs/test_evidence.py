"""Every number that README and verdicts quote comes out of the committed records."""

import json
import re
from pathlib import Path

import pytest

from batchlab.lab.studies.bn_mnist import read_finished
from batchlab.lab.studies.bn_mnist.answer import answer
from batchlab.lab.studies.bn_mnist.page import steps_table
from batchlab.lab.studies.bn_mnist.settings import SIZES, BnMnistSettings
from batchlab.lab.studies.bn_mnist.summary import Summary, summarize
from batchlab.lab.studies.search import choose_rates
from batchlab.lab.studies.stages import to_json
from batchlab.lab.study import read_study
from benchmarks.precision import errors

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "bn-mnist"


@pytest.fixture(scope="module")
def summary() -> Summary:
    settings, _, records = read_finished(STUDY)
    return summarize(settings, records, *choose_rates(settings, settings.arms, records))


def test_the_committed_study_is_the_full_one_on_all_of_mnist() -> None:
    settings, data = read_study(STUDY, BnMnistSettings)
    assert settings == SIZES["full"]
    assert data["training_images"] == 60_000


def test_the_committed_summary_is_what_the_records_say(summary: Summary) -> None:
    assert json.loads((STUDY / "summary.json").read_text()) == to_json(summary)


def test_records_come_from_one_commit_without_changes() -> None:
    commits = {json.loads(path.read_text())["environment"]["commit"] for path in STUDY.glob("runs/*/*/run.json")}
    assert len(commits) == 1
    assert not commits.pop().endswith("+")


@pytest.mark.parametrize("page", ["README.md", "experiments/bn-mnist/README.md"])
def test_pages_quote_the_answer_and_the_table(page: str, summary: Summary) -> None:
    text = re.sub(r"\s+", " ", (ROOT / page).read_text())
    for sentence in answer(SIZES["full"], summary.comparisons):
        assert sentence in text
    for row in steps_table(summary.comparisons["own"], "").rows:
        assert "| " + " | ".join(row) + " |" in text


def test_precision_is_what_the_readme_says() -> None:
    text = (ROOT / "README.md").read_text()
    for name, measured in errors().items():
        quoted = re.search(re.escape(f"| {name} |") + r" ([\d.e-]+) \| ([\d.e-]+) \|", text)
        assert quoted, name
        for number, value in zip(quoted.groups(), measured, strict=True):
            assert 1 / 4 < float(number) / value < 4  # other processors add in another order
