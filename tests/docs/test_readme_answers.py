"""The README's table of questions quotes what the studies' pages say, and those are held to the records."""

import re
from pathlib import Path

import pytest

from batchlab.lab.studies import STUDIES

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| (.+\?) \| (.+) \| \[[\w-]+\]\(experiments/([\w-]+)/README\.md\) \|$", (ROOT / "README.md").read_text(), re.M
)


def test_there_are_rows_and_every_finished_study_has_one() -> None:
    finished = {path.parent.name for path in ROOT.glob("experiments/*/summary.json")}
    assert {name for *_, name in ROWS} == finished
    assert finished <= set(STUDIES)


@pytest.mark.parametrize(("answer", "name"), [(answer, name) for _, answer, name in ROWS], ids=[row[2] for row in ROWS])
def test_numbers_of_an_answer_are_on_the_study_s_page(answer: str, name: str) -> None:
    page = re.sub(r"\s+", " ", (ROOT / "experiments" / name / "README.md").read_text())
    numbers = re.findall(r"\d[\d,]*(?:\.\d+)?(?: %)?", answer)
    assert numbers
    missing = [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]\d)", page)]
    assert not missing


def test_the_index_names_every_folder() -> None:
    index = (ROOT / "experiments" / "README.md").read_text()
    folders = {path.parent.name for path in ROOT.glob("experiments/*/study.json")}
    # Beside the studies, the page of those that were done again.
    assert folders | {"again"} == set(re.findall(r"\]\(([\w-]+)/README\.md\)", index))
