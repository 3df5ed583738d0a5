"""Every number that the page of the study factorization quotes comes out of the committed records."""

import json
import re
from pathlib import Path

from batchlab.lab.report import Table
from batchlab.lab.studies.arm_results import accuracy_table, steps_table
from batchlab.lab.studies.comparison_study import read_finished
from batchlab.lab.studies.factorization import COMPARISON
from batchlab.lab.studies.factorization.answer import ends, kept, search_note, seconds
from batchlab.lab.studies.factorization.page import chosen_rates, share_table, verdict_table
from batchlab.lab.studies.factorization.settings import ARMS, LABELS, full_name
from batchlab.lab.studies.factorization.summary import Summary
from batchlab.lab.studies.stages import to_json
from tests.docs.search_rows import search_rows

FOLDER = Path(__file__).parents[2] / "experiments" / "factorization"


def rows(table: Table) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in table.rows]


def search_tables(rates: dict[str, tuple[float, ...]], summary: Summary, start: str) -> list[str]:
    """A line for each arm: its rates differ from the others', so that they cannot be columns."""
    lines = []
    for name in ARMS:
        full = full_name(name, start)
        found = search_rows(sorted(rates[full]), summary.scores, summary.chosen, [full])
        lines.append(f"| {LABELS[name]} | " + "; ".join(row.strip("| ").replace(" | ", ": ") for row in found) + " |")
    return lines


def test_the_page_says_what_the_records_say() -> None:
    finished = read_finished(COMPARISON, FOLDER)
    summary = COMPARISON.summarize(finished)
    assert finished.settings == COMPARISON.sizes["full"]
    assert finished.training_images == 60_000
    assert json.loads((FOLDER / "summary.json").read_text()) == to_json(summary)
    text = re.sub(r"\s+", " ", (FOLDER / "README.md").read_text())
    sentences = [*COMPARISON.ending(finished, summary)[2], search_note(finished.settings, summary)]
    tables = rows(share_table(finished.settings, summary, ""))
    rates = {name: finished.settings.rates_of(name) for name in finished.chosen}
    for start, found in summary.starts.items():
        sentences += [seconds(start, found), ends(finished.settings, start, found)]
        tables += rows(verdict_table(found, ""))
        tables += rows(steps_table(found.results, LABELS, ""))
        tables += rows(accuracy_table(found.results, LABELS, chosen_rates(summary, start), ""))
        tables += search_tables(rates, summary, start)
    assert not [words for words in (*sentences, *tables) if words not in text]
    # What else the page quotes of shares is one of them, too.
    shares = {kept(share) for found in summary.starts.values() for share in found.shares.values()}
    assert set(re.findall(r"-?\d+ % \(-?\d+ to -?\d+\)", text)) <= shares
    commits = {record.environment["commit"] for record in finished.records.values()}
    assert not any(commit.endswith("+") for commit in commits)
