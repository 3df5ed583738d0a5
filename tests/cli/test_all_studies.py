"""`batchlab study all`, and one report of several studies, on two studies of seconds."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import batchlab.cli.report as report_command
import batchlab.cli.study as study_command
from batchlab.cli import main
from batchlab.lab.studies import STUDIES
from batchlab.lab.studies.collection import find_studies

TINY: dict[str, dict[str, Any]] = {
    "whitening": {
        "steps": 30,
        "seeds": 2,
        "rates": (0.3,),
        "search_steps": 10,
        "widths": (64,),
        "batch_size": 100,
        "spacing": 0.5,
        "targets": (0.15, 0.99),
    },
    "dropout-speed": {"widths": (16,), "batch_sizes": (50,), "rounds": 3},
}


@pytest.fixture
def two_studies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    # Workers outlive a test: those of all tests find the embedded digits and no other data.
    monkeypatch.setenv("BATCHLAB_DATA", "")
    monkeypatch.setenv("BATCHLAB_OFFLINE", "1")
    studies = {}
    for name, values in TINY.items():
        study = STUDIES[name]
        studies[name] = replace(study, sizes={**study.sizes, "quick": replace(study.sizes["quick"], **values)})
    for module in (study_command, report_command):
        monkeypatch.setattr(module, "STUDIES", studies)
    return tmp_path


class Links(HTMLParser):
    """Addresses in a page and the links to them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.goals: list[str] = []
        self.headings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if str(found.get("href", "")).startswith("#"):
            self.goals.append(str(found["href"])[1:])


def check_collection(page: Path, names: list[str]) -> str:
    text = page.read_text()
    links = Links(text)
    assert set(links.goals) <= set(links.ids)
    assert all(name in links.goals and f"{name}-figure" in links.goals for name in names)
    assert links.headings.count("h1") == 1
    assert links.headings.count("h2") == len(names)
    # References inside of a figure lead to a part of the same study's figures.
    inner = re.findall(r"url\(#([^)]+)\)", text)
    assert inner
    assert set(inner) <= set(links.ids)
    assert all(any(goal.startswith(f"{name}-") for name in names) for goal in inner)
    assert "http" not in re.sub(r"http://www\.w3\.org/[\w/]+", "", text)
    return text


def test_all_studies_run_are_reported_together_and_are_continued(
    two_studies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "all", "--quick", "--seeds", "2"]) == 0
    folder = two_studies / "runs" / "all-quick"
    text = check_collection(folder / "report.html", ["whitening", "dropout-speed"])
    assert text.index('id="whitening"') < text.index('id="dropout-speed"')
    output = capsys.readouterr().out
    assert "1 of 2: whitening" in output
    assert "2 of 2: dropout-speed" in output
    assert (folder / "whitening" / "report.html").is_file()

    records = {path: path.stat().st_mtime_ns for path in folder.glob("*/runs/*/*/result.json")}
    assert len(records) > 10
    assert main(["study", "all", "--quick", "--seeds", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in records} == records

    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert Links((folder / "report.html").read_text()).ids == Links(before.decode()).ids

    # One that is not finished is left out, and said to be.
    for result in (folder / "whitening").glob("runs/final/none-*/result.json"):
        result.unlink()
    capsys.readouterr()
    assert main(["report", str(folder), "--out", "some.html"]) == 0
    text = check_collection(two_studies / "some.html", ["dropout-speed"])
    assert "Not finished, and so not here: whitening." in text
    assert "Left out: whitening" in capsys.readouterr().out
    assert main(["report", str(folder / "whitening"), "--out", "none.html"]) == 2
    assert "no study is finished" in capsys.readouterr().err
    assert not (two_studies / "none.html").exists()


def test_studies_are_found_once_each(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "study.json").write_text("{}")
    assert find_studies([tmp_path]) == [tmp_path / "a", tmp_path / "b"]
    assert find_studies([tmp_path / "b", tmp_path]) == [tmp_path / "b", tmp_path / "a"]
    assert find_studies([tmp_path / "deep"]) == [tmp_path / "deep" / "c"]
    with pytest.raises(FileNotFoundError, match="holds no study"):
        find_studies([tmp_path / "a", tmp_path / "deep" / "none"])
