"""Every number that cards and verdicts on batchwise dropout quote comes out of the committed records."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from batchlab.lab.report import Table
from batchlab.lab.studies.comparison_study import Comparison, Finished, read_finished
from batchlab.lab.studies.dropout_mnist import COMPARISON as DROPOUT_MNIST
from batchlab.lab.studies.dropout_mnist.page import error_table, target_table, verdict_table
from batchlab.lab.studies.dropout_patterns import COMPARISON as DROPOUT_PATTERNS
from batchlab.lab.studies.dropout_patterns import page as patterns_page
from batchlab.lab.studies.dropout_speed.answer import answer as speed_answer
from batchlab.lab.studies.dropout_speed.measure import plan, read_point
from batchlab.lab.studies.dropout_speed.page import verdict_table as speed_verdicts
from batchlab.lab.studies.dropout_speed.settings import SIZES as SPEED_SIZES
from batchlab.lab.studies.dropout_speed.settings import DropoutSpeedSettings
from batchlab.lab.studies.dropout_speed.summary import summarize as summarize_speed
from batchlab.lab.studies.dropout_speed.summary import to_json as speed_json
from batchlab.lab.studies.stages import to_json
from batchlab.lab.study import read_study
from tests.docs.search_rows import search_rows

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
COMPARISONS = {study.name: study for study in (DROPOUT_MNIST, DROPOUT_PATTERNS)}


def one_line(path: Path) -> str:
    return re.sub(r"\s+", " ", path.read_text())


def rows(table: Table) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in table.rows]


def tables(comparison: Comparison, finished: Finished, summary: Any) -> list[str]:
    if comparison is DROPOUT_MNIST:
        return [
            *rows(error_table(summary, "")),
            *rows(target_table(summary.targets, "")),
            *rows(verdict_table(finished.settings, summary, "")),
            *search_rows(finished.settings.rates, finished.scores, finished.chosen, finished.chosen),
        ]
    return [
        *rows(patterns_page.error_table(summary, "")),
        *rows(patterns_page.verdict_table(finished.settings, summary, "")),
    ]


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_page_says_what_the_records_say(name: str) -> None:
    comparison, folder = COMPARISONS[name], EXPERIMENTS / name
    finished = read_finished(comparison, folder)
    summary = comparison.summarize(finished)
    assert finished.settings == comparison.sizes["full"]
    assert finished.training_images == 60_000
    assert json.loads((folder / "summary.json").read_text()) == to_json(summary)
    text = one_line(folder / "README.md")
    for sentence in comparison.ending(finished, summary)[2]:
        assert sentence in text
    for row in tables(comparison, finished, summary):
        assert row in text
    commits = {record.environment["commit"] for record in finished.records.values()}
    assert not any(commit.endswith("+") for commit in commits)


def test_the_readme_quotes_the_study() -> None:
    finished = read_finished(DROPOUT_MNIST, EXPERIMENTS / "dropout-mnist")
    errors = DROPOUT_MNIST.summarize(finished).errors
    quoted = {"batchwise": "{} % test error ({} to {})", "independent": "{} % ({} to {})", "none": "{} % ({} to {})"}
    text = one_line(ROOT / "README.md")
    for name, words in quoted.items():
        e = errors[name]
        assert words.format(*(f"{100 * value:.2f}" for value in (e.mean, e.low, e.high))) in text
    ratios = [record["ratio"] for record in recorded("ratio")]
    assert all(3 < ratio["independent"][0] < 4.5 for ratio in ratios)
    assert all(1.0 <= round(1 / ratio["small"][0], 1) <= 1.3 for ratio in ratios)


def test_the_page_on_speed_says_what_the_records_say() -> None:
    folder = EXPERIMENTS / "dropout-speed"
    settings, _ = read_study(folder, DropoutSpeedSettings)
    assert settings == SPEED_SIZES["full"]
    points = [read_point(folder / name, settings) for name in plan(settings)]
    found = summarize_speed(settings, points)
    assert json.loads((folder / "summary.json").read_text()) == speed_json(found)
    text = one_line(folder / "README.md")
    for sentence in speed_answer(settings, found):
        assert sentence in text
    for row in rows(speed_verdicts(found)):
        assert row in text


def recorded(part: str) -> list[dict[str, Any]]:
    """The last measurement of each of the five networks that has a `part`."""
    lines = (ROOT / "benchmarks" / "results" / "batchwise_dropout.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if part in record and ("small" in record[part])][-5:]
    assert len({record["case"] for record in records}) == len(records) == 5
    assert not any(record["environment"]["commit"].endswith("+") for record in records)
    return records


def test_the_card_quotes_the_recorded_speeds() -> None:
    card = (ROOT / "docs" / "cards" / "batchwise_dropout.md").read_text()
    quoted = re.findall(r"^\| \S.*? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    for row, record in zip(quoted, recorded("ratio"), strict=True):
        ratio = {name: values[0] for name, values in record["ratio"].items()}
        assert row == (f"{ratio['independent']:.1f}", f"{ratio['none']:.1f}", f"{1 / ratio['small']:.2f}")


def test_the_card_quotes_the_recorded_memory() -> None:
    def megabytes(value: int) -> str:
        return f"{value / 1e6:.0f}" if value > 1e8 else f"{value / 1e6:.1f}"

    large, conv = (recorded("bytes")[index]["bytes"] for index in (2, 4))
    parts = [
        (kind, part, f"{megabytes(large[kind][part])} MB", f"{megabytes(conv[kind][part])} MB")
        for kind in ("independent", "batchwise")
        for part in ("activations", "peak")
    ]
    card = one_line(ROOT / "docs" / "cards" / "batchwise_dropout.md")
    assert (
        "Activations that wait for the backward pass fall from {0[2]} with `torch.nn.Dropout` to {2[2]} ".format(*parts)
        in card
    )
    assert "the peak of the whole training step from {1[2]} to {3[2]}.".format(*parts) in card
    assert "activations fall from {0[3]} to {2[3]}, and the peak from {1[3]} to {3[3]},".format(*parts) in card
    assert f"wait beside them, {megabytes(large['batchwise']['weight_copies'])} MB;" in card


def test_the_card_quotes_the_recorded_sweep() -> None:
    lines = (ROOT / "benchmarks" / "results" / "batchwise_dropout.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["case"].startswith("auto over independent")][-18:]
    assert not any(record["environment"]["commit"].endswith("+") for record in records)
    found = {(record["case"], p): values[0] for record in records for p, values in record["ratio"].items()}
    assert len(found) == 18 * 6
    card = one_line(ROOT / "docs" / "cards" / "batchwise_dropout.md")
    assert f"took {min(found.values()):.2f} to {max(found.values()):.2f} times as long" in card
    assert max(found.values()) < 1
    even = [case for case, value in found.items() if value > 0.94]
    assert all("-32-32-" in case and p in ("0.05", "0.1") for case, p in even)
