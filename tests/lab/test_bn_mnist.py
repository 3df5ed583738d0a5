"""The study end to end on a size of seconds, and each sentence of its answer."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from batchlab.lab.comparison import Estimate, StepsToTarget
from batchlab.lab.settings import SettingsError, write_settings
from batchlab.lab.studies.bn_mnist.answer import answer, count, percent, ratio_text
from batchlab.lab.studies.bn_mnist.plan import arms, final_pairs
from batchlab.lab.studies.bn_mnist.settings import SIZES, BnMnistSettings
from batchlab.lab.studies.bn_mnist.summary import Comparison
from batchlab.lab.studies.search import choose_rates, final_plan, search_plan

TINY = BnMnistSettings(
    steps=80, seeds=2, rates=(0.3, 1.0), search_steps=30, search_seeds=1, well_scaled_std=0.1, widths=(20, 15)
)
ENVIRONMENT = {**os.environ, "BATCHLAB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "BATCHLAB_DATA": ""}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "batchlab.cli", *words]


def study(folder: Path, *words: str, jobs: int = 2) -> subprocess.CompletedProcess[str]:
    settings = folder.parent / "tiny.json"
    write_settings(TINY, settings)
    line = command("study", "bn-mnist", "--settings", str(settings), "--out", str(folder), "--jobs", str(jobs), *words)
    return subprocess.run(line, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)


def evidence(folder: Path) -> dict[str, bytes]:
    """Everything a study leaves that must be the same when it is repeated: all but clocks and locks."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    skipped = {"timing.json", "summary.json", "report.html"}  # the last two quote seconds per step
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name not in skipped}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "out"
    done = study(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_finished_study_can_be_called_again_without_its_weights(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    done = study(folder)
    assert done.returncode == 0, done.stderr
    assert evidence(folder) == {k: v for k, v in evidence(finished).items() if not k.endswith(".safetensors")}
    (folder / "mistakes.json").unlink()
    done = study(folder)
    assert done.returncode == 2
    assert "weights.safetensors is missing or damaged" in done.stderr


@pytest.mark.parametrize("content", ["[]", "{}", '{"study": ["x"], "settings": {}, "data": {}}'])
def test_a_study_file_that_says_something_else_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(content)
    report = subprocess.run(
        command("report", str(tmp_path)), capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    for done in (study(tmp_path), report):
        assert done.returncode == 2
        assert "study.json is damaged" in done.stderr


def test_a_study_leaves_records_figures_and_a_report(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert {"study.json", "summary.json", "mistakes.json", "report.html", "figures", "runs"} <= names
    html = (finished / "report.html").read_text()
    needs = (
        "5,000 MNIST digits",
        "Training steps until",
        "running averages",
        "What it still gets wrong",
        "well-scaled",
    )
    for need in needs:
        assert need in html
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["comparisons"]) == {"own", "same", "well_scaled"}
    mistakes = json.loads((finished / "mistakes.json").read_text())
    result = json.loads((finished / mistakes["run"] / "result.json").read_text())
    assert len(mistakes["mistakes"]) == round((1 - result["accuracy"]) * mistakes["images"])
    assert all(item["guesses"][0] != item["label"] for item in mistakes["mistakes"])


def test_repeated_with_one_process_it_is_the_same_to_the_last_bit(finished: Path, tmp_path: Path) -> None:
    done = study(tmp_path / "out", jobs=1)
    assert done.returncode == 0, done.stderr
    assert evidence(tmp_path / "out") == evidence(finished)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_continued_it_ends_the_same(signal_number: int, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_settings(TINY, tmp_path / "tiny.json")
    line = command("study", "bn-mnist", "--settings", str(tmp_path / "tiny.json"), "--out", str(folder), "--jobs", "2")
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while len(list(folder.glob("runs/*/*/result.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from there" in errors
        assert f"--out {folder}" in errors
        assert "Traceback" not in errors
    done = study(folder)
    assert done.returncode == 0, done.stderr
    assert evidence(folder) == evidence(finished)


def test_two_processes_do_not_work_in_one_folder(finished: Path) -> None:
    from batchlab.lab.files import locked

    with locked(finished, "study"):
        done = study(finished)
    assert done.returncode == 1
    assert "another process is working" in done.stderr
    assert "Traceback" not in done.stderr


def test_report_again_from_committed_records_without_weights(finished: Path, tmp_path: Path) -> None:
    for path in finished.rglob("*"):
        if path.suffix in (".json", ".jsonl") and path.name != "summary.json":
            target = tmp_path / path.relative_to(finished)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    done = subprocess.run(command("report", str(tmp_path)), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").read_bytes() == (finished / "report.html").read_bytes()


def test_other_settings_in_the_same_folder_are_refused(finished: Path) -> None:
    before = evidence(finished)
    done = study(finished, "--seeds", "3")
    assert done.returncode == 2
    assert "settings.seeds: 2, not 3" in done.stderr
    assert evidence(finished) == before


def test_search_and_comparison_share_neither_seeds_nor_images() -> None:
    search = search_plan(TINY, arms(TINY), 4000)
    final = final_plan(TINY, arms(TINY), final_pairs({"none": 0.3, "batch_norm": 1.0}))
    assert {run.seed for run in search.values()}.isdisjoint({run.seed for run in final.values()})
    assert min(run.seed for run in search.values()) == 1000
    assert all(run.data.validation == 667 for run in search.values())
    assert all(run.data.validation == 0 for run in final.values())
    names = {name.split("-seed")[0] for name in final}
    assert names == {f"runs/final/{name}" for name in ("none-rate0.3", "batch_norm-rate1", "batch_norm-rate0.3")}


@dataclasses.dataclass
class Scored:
    """Stands in for a record: what `final_score` reads."""

    accuracy: float
    diverged: bool = False
    settings: Any = TINY

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        return [self.settings.steps], [self.accuracy]


def test_best_rate_is_chosen_by_validation_and_ties_go_to_the_smaller() -> None:
    settings = dataclasses.replace(TINY, rates=(0.1, 0.3, 1.0), well_scaled_std=0.0)
    accuracies = {"none": (0.5, 0.7, 0.7), "batch_norm": (0.8, 0.9, 0.99)}
    records: dict[str, Any] = {}
    for arm, values in accuracies.items():
        for rate, value in zip(settings.rates, values, strict=True):
            records[f"runs/search/{arm}-rate{rate:g}-seed1000"] = Scored(value, diverged=value == 0.99)
    chosen, scores = choose_rates(settings, settings.arms, records)
    assert chosen == {"none": 0.3, "batch_norm": 0.3}
    assert scores["batch_norm"][1.0] == [0.0]


Triple = tuple[float, float, float]


def comparison(ratio: Triple, gain: Triple, target: float | None = 0.95) -> Comparison:
    row = StepsToTarget(target, (1000, 1100), (500, 520), Estimate(*ratio, 2))
    accuracy = (Estimate(0.96, 0.95, 0.97, 2), Estimate(0.97, 0.96, 0.98, 2))
    return Comparison(("none", 0.1), ("batch_norm", 1.0), (row,), accuracy, Estimate(*gain, 2), row)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (comparison((2.1, 1.9, 2.3), (0.01, 0.005, 0.015)), ("2.1 times fewer", "better by 1.00 percentage points")),
        (comparison((0.5, 0.4, 0.6), (-0.01, -0.02, -0.005)), ("2.0 times more", "worse by 1.00 percentage points")),
        (comparison((1.2, 0.9, 1.5), (0.01, -0.02, 0.04)), ("no clear difference", "no clear difference")),
        (comparison((2.0, float("nan"), float("nan")), (0.01, *[float("nan")] * 2)), ("one seed", "one seed")),
        (comparison((2.0, 1.5, 2.5), (0.01, 0.0, 0.02), None), ("as good as it ever became without", "no clear")),
        (dataclasses.replace(comparison((2, 1, 3), (0, 0, 0)), headline=None), ("no fair number", "no clear")),
    ],
)
def test_the_answer_says_what_the_numbers_say(given: Comparison, expected: tuple[str, str]) -> None:
    sentences = answer(TINY, {"own": given})
    assert len(sentences) == 2
    for sentence, part in zip(sentences, expected, strict=True):
        assert part in sentence


def test_the_answer_does_not_hide_what_a_better_start_does() -> None:
    own = comparison((2.1, 1.9, 2.3), (0.01, 0.005, 0.015))
    control = comparison((0.5, 0.4, 0.6), (0.0, -0.01, 0.01), 0.97)
    sentences = answer(TINY, {"own": own, "well_scaled": control})
    assert len(sentences) == 2
    assert (
        "from well-scaled first weights it takes 510 steps with and 1,050 without to 97 %: 2.0 times more"
        in sentences[1]
    )


def test_numbers_are_written_for_people() -> None:
    assert [count(v) for v in (1.0, 87, 637.3, 1184, 12_345, 50_000)] == ["1", "87", "637", "1,180", "12,300", "50,000"]
    assert percent(Estimate(0.97123, 0.9701, 0.9723, 3)) == "97.12 % (97.01 to 97.23)"
    assert ratio_text(Estimate(3.34, 3.0, 3.64, 3)) == "3.3 (3.0 to 3.6)"


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": 0},
        {"rates": ()},
        {"rates": (0.1, 0.1)},
        {"held_out_share": 1.0},
        {"targets": (95.0,)},
        {"seeds": 1001},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(changes))):
        dataclasses.replace(TINY, **changes)


def test_the_full_size_is_the_paper() -> None:
    full = SIZES["full"]
    assert (full.steps, full.batch_size, full.widths) == (50_000, 60, (100, 100, 100))
    assert full.seeds >= 3
