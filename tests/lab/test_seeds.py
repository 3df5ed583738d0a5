"""Another first seed repeats a whole study with other randomness, and nothing else about it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.cli import main
from batchlab.lab.settings import SettingsError
from batchlab.lab.studies.ending import command_for
from batchlab.lab.studies.search import final_plan, search_plan
from batchlab.lab.studies.settings import ComparisonSettings
from batchlab.lab.studies.whitening import arms
from batchlab.lab.studies.whitening.settings import SIZES, WhiteningSettings

TINY = replace(
    SIZES["quick"], steps=30, rates=(0.3,), search_steps=10, widths=(64,), batch_size=100, spacing=0.5, targets=(0.15,)
)


def _seeds(settings: WhiteningSettings) -> tuple[list[int], list[int]]:
    search = search_plan(settings, arms(settings), 4_000)
    final = final_plan(settings, arms(settings), [("none", 0.3)])
    return sorted({run.seed for run in search.values()}), sorted({run.seed for run in final.values()})


def test_search_and_final_runs_both_get_other_seeds() -> None:
    assert _seeds(TINY) == ([1000], [0, 1])
    assert _seeds(replace(TINY, first_seed=100, search_seeds=2)) == ([1100, 1101], [100, 101])


@pytest.mark.parametrize(("first", "seeds", "search"), [(0, 1000, 5), (7, 1000, 1), (999, 3, 4), (5000, 2, 3)])
def test_no_final_run_has_a_seed_of_the_search(first: int, seeds: int, search: int) -> None:
    settings = ComparisonSettings(first_seed=first, seeds=seeds, search_seeds=search)
    assert set(settings.final_seeds).isdisjoint(settings.seeds_of_search)
    assert (len(settings.final_seeds), len(settings.seeds_of_search)) == (seeds, search)


@pytest.mark.parametrize("first", [-1, 10**10])
def test_a_seed_that_no_run_can_have_is_refused(first: int) -> None:
    with pytest.raises(SettingsError, match=f"first_seed is {first}; allowed: 0 to"):
        ComparisonSettings(first_seed=first)


def test_the_command_says_which_seeds() -> None:
    settings = replace(SIZES["full"], first_seed=100, seeds=3)
    assert command_for("whitening", settings, SIZES) == "batchlab study whitening --seeds 3 --first-seed 100"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A study of seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHLAB_DATA", "")
    monkeypatch.setenv("BATCHLAB_OFFLINE", "1")
    content = {"steps": 30, "rates": [0.3], "search_steps": 10, "widths": [64], "batch_size": 100, "spacing": 0.5}
    Path("tiny.json").write_text(json.dumps(content))
    return ["study", "whitening", "--settings", "tiny.json", "--seeds", "2", "--out", "folder", "--jobs", "1"]


def test_a_study_with_other_seeds_is_another_study(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--first-seed", "7"]) == 0
    assert {path.name.rsplit("-seed", 1)[1] for path in Path("folder/runs/final").iterdir()} == {"7", "8"}
    assert main(words) == 2
    assert "settings.first_seed: 7, not 0" in capsys.readouterr().err


def test_a_folder_from_before_there_was_a_first_seed_goes_on(words: list[str]) -> None:
    assert main(words) == 0
    study = json.loads(Path("folder/study.json").read_text())
    del study["settings"]["first_seed"]
    Path("folder/study.json").write_text(json.dumps(study))
    before = sorted(path.stat().st_mtime_ns for path in Path("folder").rglob("result.json"))
    assert main(words) == 0
    assert sorted(path.stat().st_mtime_ns for path in Path("folder").rglob("result.json")) == before
