"""Every number that cards and verdicts on batchwise dropout quote comes out of the committed records."""

import json
import re
from pathlib import Path

from batchlab.lab.records import read_record
from batchlab.lab.studies.dropout_mnist import COMPARISON as DROPOUT_MNIST
from batchlab.lab.studies.search import choose_rates, search_plan
from batchlab.lab.study import read_study

ROOT = Path(__file__).parents[2]


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
    settings, data = read_study(folder, DROPOUT_MNIST.settings)
    assert settings == DROPOUT_MNIST.sizes["full"]
    arms = DROPOUT_MNIST.arms(settings)
    plan = search_plan(settings, arms, data["training_images"])
    chosen, scores = choose_rates(settings, arms, {name: read_record(folder / name) for name in plan})
    text = (folder / "README.md").read_text()
    for rate in settings.rates:
        cells = []
        for arm, found in scores.items():
            cell = f"{100 * found[rate][0]:.2f} %" if found[rate][0] else "diverged"
            cells.append(f"**{cell}**" if chosen[arm] == rate else cell)
        assert f"| {rate:g} | {' | '.join(cells)} |" in text
