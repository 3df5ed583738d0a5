"""The study dropout-speed end to end on its quick size, and each sentence of its answer; never how fast anything is."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from batchlab.lab.data import Dataset
from batchlab.lab.settings import SettingsError, write_settings
from batchlab.lab.studies.dropout_speed.answer import answer, percent_range, seconds_text
from batchlab.lab.studies.dropout_speed.measure import Point, check_settings, plan, read_point
from batchlab.lab.studies.dropout_speed.page import verdict_table
from batchlab.lab.studies.dropout_speed.settings import SIZES, DropoutSpeedSettings
from batchlab.lab.studies.dropout_speed.summary import summarize, to_json
from batchlab.lab.study import read_study
from batchlab.lab.timing import Quartiles

ENVIRONMENT = {**os.environ, "BATCHLAB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "BATCHLAB_DATA": ""}
TINY = DropoutSpeedSettings(widths=(20, 40), batch_sizes=(10, 30), rounds=3, turn_seconds=0.001)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "batchlab.cli", *words]


def study(*words: str) -> subprocess.CompletedProcess[str]:
    line = command("study", "dropout-speed", *words)
    return subprocess.run(line, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)


def tiny(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    write_settings(TINY, folder.parent / "tiny.json")
    return study("--settings", str(folder.parent / "tiny.json"), "--out", str(folder), *words)


def records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "points").glob("*.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "out"
    done = tiny(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_quick_size_runs_end_to_end(tmp_path: Path) -> None:
    done = study("--quick", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    html = (tmp_path / "out" / "report.html").read_text()
    for need in (
        "extrapolated from some steps",
        "33\u00a0%",
        "42\u00a0%",
        "75\u00a0%",
        "as recalled",
        "GTX 780",
        "5,000 MNIST digits",
        "batchlab study dropout-speed --size quick",
        "one thread",
        "fused",
    ):
        assert need in html
    assert html.count("<svg") == 3
    assert set(records(tmp_path / "out")) == {f"width{n}-batch100.json" for n in SIZES["quick"].widths}


def test_a_point_is_a_record_with_its_environment(finished: Path) -> None:
    settings, data = read_study(finished, DropoutSpeedSettings)
    assert settings == TINY
    assert data["training_images"] == 4000
    assert set(records(finished)) == {f"width{n}-batch{b}.json" for n in TINY.widths for b in TINY.batch_sizes}
    content = json.loads((finished / "points" / "width40-batch30.json").read_text())
    assert {"torch", "processor", "commit", "threads"} <= set(content["environment"])
    assert {arm: len(values) for arm, values in content["seconds_per_step"].items()} == dict.fromkeys(
        ("none", "independent", "batchwise", "small"), TINY.rounds
    )
    summary = json.loads((finished / "summary.json").read_text())
    points = [read_point(finished / name, settings) for name in plan(settings)]
    assert summary == to_json(summarize(settings, points))


def test_finished_points_are_not_measured_again(finished: Path) -> None:
    before = records(finished)
    missing = finished / "points" / "width20-batch30.json"
    missing.unlink()
    done = tiny(finished, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert "whatever --jobs says" in done.stdout
    after = records(finished)
    assert set(after) == set(before)
    assert all(after[name] == content for name, content in before.items() if name != missing.name)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_it_goes_on_with_the_next_point(signal_number: int, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    slow = dataclasses.replace(TINY, turn_seconds=0.03)
    write_settings(slow, tmp_path / "slow.json")
    words = ["study", "dropout-speed", "--settings", str(tmp_path / "slow.json"), "--out", str(folder)]
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    while not list(folder.glob("points/*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    before = records(folder)
    assert len(before) < 4
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from there" in errors
    done = study(*words[2:])
    assert done.returncode == 0, done.stderr
    after = records(folder)
    assert len(after) == 4
    assert all(after[name] == content for name, content in before.items())


def test_the_report_is_written_again_from_records(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "points").mkdir()
    for path in [finished / "study.json", *(finished / "points").glob("*.json")]:
        (tmp_path / path.relative_to(finished)).write_bytes(path.read_bytes())
    done = subprocess.run(command("report", str(tmp_path)), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    for name in ("report.html", "summary.json", "figures/saving-none.svg", "figures/seconds-batch30.svg"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def copied(finished: Path, folder: Path, change: Any) -> Path:
    (folder / "points").mkdir(parents=True)
    (folder / "study.json").write_bytes((finished / "study.json").read_bytes())
    for path in (finished / "points").iterdir():
        (folder / "points" / path.name).write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


def test_times_of_two_machines_are_not_mixed(finished: Path, tmp_path: Path) -> None:
    def elsewhere(content: dict[str, Any]) -> dict[str, Any]:
        return content | {"environment": content["environment"] | {"processor": "Z80"}}

    folder = copied(finished, tmp_path / "out", elsewhere)
    assert tiny(folder).returncode == 0  # nothing is missing: the report says which machine it was
    assert "Z80" in (folder / "report.html").read_text()
    (folder / "points" / "width20-batch10.json").unlink()
    done = tiny(folder)
    assert done.returncode == 2
    assert "measured elsewhere (processor: Z80, not " in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content | {"seconds_per_step": {}},
        lambda content: content | {"seconds_per_step": content["seconds_per_step"] | {"none": [0.1]}},
        lambda content: [],
    ],
    ids=["no times", "too few", "no object"],
)
def test_damaged_points_are_named(change: Any, finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path / "out", change)
    done = subprocess.run(command("report", str(folder)), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "points/width" in done.stderr
    assert "is damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unfinished_study_has_no_report(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path / "out", lambda content: content)
    (folder / "points" / "width20-batch10.json").unlink()
    done = subprocess.run(command("report", str(folder)), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "width20-batch10.json is missing: the study is not finished" in done.stderr


def test_random_starts_are_refused_since_there_are_none(tmp_path: Path) -> None:
    done = study("--quick", "--seeds", "3", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "leave out --seeds" in done.stderr
    assert not (tmp_path / "out").exists()


def test_batches_beyond_the_data_are_refused(digits: Dataset) -> None:
    with pytest.raises(SettingsError, match="batch_sizes has 1000; allowed: up to 600"):
        check_settings(SIZES["full"], digits)


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": ()},
        {"widths": (10, 10)},
        {"batch_sizes": (0,)},
        {"hidden_layers": 0},
        {"rounds": 2},
        {"input_rate": 1.0},
        {"rate": 0.0},
        {"turn_seconds": 0.0},
        {"epoch_images": 0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(changes))):
        dataclasses.replace(TINY, **changes)


def test_the_full_size_is_the_paper() -> None:
    full = SIZES["full"]
    assert (full.hidden_layers, full.input_rate, full.rate, full.epoch_images) == (3, 0.2, 0.5, 60_000)
    assert {125, 250, 500, 1000, 2000, 4000} == set(full.widths)
    assert {100, 1000} <= set(full.batch_sizes)
    assert {"full", "demo", "quick"} == set(SIZES)


def point(width: int, batch_size: int, none: float, independent: float, batchwise: float, small: float) -> Point:
    seconds = {"none": none, "independent": independent, "batchwise": batchwise, "small": small}
    return Point(width, batch_size, 1, {arm: [value] * 3 for arm, value in seconds.items()}, {})


def test_numbers_come_out_of_points() -> None:
    row, other = summarize(TINY, [point(500, 100, 4, 8, 2, 1), point(40, 10, 1, 1, 1, 1)])[::-1]
    assert row.epoch["none"].median == 4 * 600
    assert other.epoch["none"].median == 6000
    assert row.times_faster["independent"].median == 4
    assert row.over_limit.median == 2
    assert 0.25 < row.work < 0.4


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (
            [point(500, 100, 3, 4, 2, 1.6)],
            ("33 % less time", "50 % less time", "as recalled", "33 % and 42 %", "33 % less (500", "takes 1.25 times"),
        ),
        (
            [point(500, 100, 1, 1, 2, 1), point(1000, 100, 4, 4, 2, 1.9)],
            (
                "100 % more time",
                "from 100 % more (500 units",
                "to 50 % less (1,000 units",
                "1.05 to 2.00 times as long",
            ),
        ),
        ([point(40, 10, 2, 2, 2, 2)], ("about as much time as", "40 units and batches of 10", "0 % less")),
    ],
    ids=["as the paper", "slower, then faster", "no difference"],
)
def test_the_answer_says_what_the_numbers_say(points: list[Point], expected: tuple[str, ...]) -> None:
    sentences = answer(TINY, summarize(TINY, points))
    assert len(sentences) == 2
    for part in expected:
        assert part in " ".join(sentences)
    assert ("recalled" in sentences[0]) == (points[0].width == 500)


def test_the_verdict_stands_next_to_the_paper() -> None:
    rows = summarize(TINY, [point(500, 100, 3, 4, 2, 1.6)])
    cells = [row[1:] for row in verdict_table(rows).rows]
    assert cells[0] == ["33 %", "33 % (33 to 33)"]
    assert cells[1] == ["42 %", "50 % (50 to 50)"]
    missing = verdict_table(summarize(TINY, [point(40, 10, 2, 2, 2, 2)])).rows
    assert missing[0][2] == missing[1][2] == "not measured in this size"


def test_numbers_are_written_for_people() -> None:
    assert [seconds_text(value) for value in (0.12345, 1.5, 45.67, 1234.5)] == ["0.123", "1.5", "45.7", "1,234"]
    assert percent_range(Quartiles(-0.1, 0.333, 0.5)) == "33 % (-10 to 50)"
