"""Every number that README and verdicts quote comes out of the committed records."""

import json
import re
from pathlib import Path

import pytest

from batchlab.lab.records import read_record
from batchlab.lab.studies.bn_mnist.answer import answer
from batchlab.lab.studies.bn_mnist.page import steps_table
from batchlab.lab.studies.bn_mnist.plan import choose_rates, final_plan, search_plan
from batchlab.lab.studies.bn_mnist.settings import SIZES, BnMnistSettings
from batchlab.lab.studies.bn_mnist.summary import Summary, summarize, to_json
from batchlab.lab.studies.dropout_mnist.plan import choose_rates as dropout_rates
from batchlab.lab.studies.dropout_mnist.plan import search_plan as dropout_search
from batchlab.lab.studies.dropout_mnist.settings import SIZES as DROPOUT_SIZES
from batchlab.lab.studies.dropout_mnist.settings import DropoutMnistSettings
from batchlab.lab.study import read_study
from benchmarks.precision import errors

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "bn-mnist"


@pytest.fixture(scope="module")
def summary() -> Summary:
    settings, data = read_study(STUDY, BnMnistSettings)
    search = {name: read_record(STUDY / name) for name in search_plan(settings, data["training_images"])}
    chosen, scores = choose_rates(settings, search)
    final = {name: read_record(STUDY / name) for name in final_plan(settings, chosen)}
    return summarize(settings, search | final, chosen, scores)


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


def test_the_dropout_card_quotes_the_recorded_speeds() -> None:
    lines = (ROOT / "benchmarks" / "results" / "batchwise_dropout.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "small" in record.get("ratio", {})][-5:]
    card = (ROOT / "docs" / "cards" / "batchwise_dropout.md").read_text()
    rows = re.findall(r"^\| \S.*? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    assert len(rows) == len(records) == 5
    for row, record in zip(rows, records, strict=True):
        ratio = {name: values[0] for name, values in record["ratio"].items()}
        assert row == (f"{ratio['independent']:.1f}", f"{ratio['none']:.1f}", f"{1 / ratio['small']:.2f}")
        assert not record["environment"]["commit"].endswith("+")


def test_the_search_of_dropout_mnist_is_what_its_page_says() -> None:
    folder = ROOT / "experiments" / "dropout-mnist"
    settings, data = read_study(folder, DropoutMnistSettings)
    assert settings == DROPOUT_SIZES["full"]
    records = {name: read_record(folder / name) for name in dropout_search(settings, data["training_images"])}
    chosen, scores = dropout_rates(settings, records)
    text = (folder / "README.md").read_text()
    for rate in settings.rates:
        cells = []
        for arm, found in scores.items():
            cell = f"{100 * found[rate][0]:.2f} %" if found[rate][0] else "diverged"
            cells.append(f"**{cell}**" if chosen[arm] == rate else cell)
        assert f"| {rate:g} | {' | '.join(cells)} |" in text
