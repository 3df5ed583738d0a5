"""Runs: repeatable, resumable after kill -9 at any evaluation, never mixed, readable."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from batchlab.lab.data import Dataset, load_embedded
from batchlab.lab.execution import run_all
from batchlab.lab.records import describe_environment, read_metrics, read_record
from batchlab.lab.run import build_network, load_inputs, run
from batchlab.lab.settings import DataSettings, NetworkSettings, OptimizerSettings, RunSettings, SettingsError
from batchlab.lab.training import evaluate


def settings(**changes: Any) -> RunSettings:
    values: dict[str, Any] = {
        "network": NetworkSettings((20, 12), normalization="batch_norm"),
        "optimizer": OptimizerSettings(0.5, schedule="linear"),
        "steps": 120,
        "batch_size": 30,
        "seed": 3,
        "spacing": 0.2,
    }
    return RunSettings(**(values | changes))


def outcome(folder: Path) -> dict[str, bytes]:
    """Everything of a record that must repeat: all but the clock."""
    names = ("run.json", "metrics.jsonl", "result.json", "weights.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    run(settings(), load_embedded(), folder)
    return folder


def test_a_run_repeats_to_the_last_bit(undisturbed: Path, tmp_path: Path) -> None:
    run(settings(), load_embedded(), tmp_path)
    assert outcome(tmp_path) == outcome(undisturbed)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "result.json",
        "run.json",
        "run.lock",
        "timing.json",
        "weights.safetensors",
    ]


def train_until_killed(folder: str, evaluations: int, checkpoint_seconds: float) -> None:
    torch.set_num_threads(1)
    left = evaluations

    def kill(_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    run(settings(), load_embedded(), Path(folder), kill, checkpoint_seconds)


@pytest.mark.parametrize("kills", [(1,), (2, 3), (4, 1, 2), (9, 1)])
def test_killed_and_continued_it_ends_the_same(kills: tuple[int, ...], undisturbed: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for evaluations in kills:
        process = context.Process(target=train_until_killed, args=(str(tmp_path), evaluations, 0.0))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "result.json").exists()
    run(settings(), load_embedded(), tmp_path)
    assert outcome(tmp_path) == outcome(undisturbed)


def test_a_continued_run_does_not_start_again(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train_until_killed, args=(str(tmp_path), 6, 0.0))
    process.start()
    process.join(60)
    done = read_metrics(tmp_path / "metrics.jsonl")[-2]["step"]  # the last one has no checkpoint yet
    seen: list[int] = []
    run(settings(), load_embedded(), tmp_path, seen.append)
    assert min(seen) > done > 0


@pytest.mark.parametrize(
    "damage",
    ["torn metrics", "torn checkpoint", "foreign checkpoint", "flipped bit", "hostile checkpoint", "stray partial"],
)
def test_damage_by_a_crash_is_survived(damage: str, undisturbed: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train_until_killed, args=(str(tmp_path), 5, 0.0))
    process.start()
    process.join(60)
    checkpoint, metrics = tmp_path / "checkpoint.pt", tmp_path / "metrics.jsonl"
    if damage == "torn metrics":
        metrics.write_bytes(metrics.read_bytes()[:-7])
    elif damage == "torn checkpoint":
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    elif damage == "foreign checkpoint":
        torch.save({"run": "another version"}, checkpoint)
    elif damage == "flipped bit":
        content = bytearray(checkpoint.read_bytes())
        content[len(content) // 2] ^= 4
        checkpoint.write_bytes(content)
    elif damage == "hostile checkpoint":
        checkpoint.write_bytes(pickle.dumps({"a": 1}))
    else:
        (tmp_path / ".checkpoint.pt.1.partial").write_bytes(b"half")
    run(settings(), load_embedded(), tmp_path)
    assert outcome(tmp_path) == outcome(undisturbed)


def test_what_a_kill_at_the_very_end_leaves_is_cleared_away(undisturbed: Path, tmp_path: Path) -> None:
    for source in undisturbed.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(b"old")
    (tmp_path / ".result.json.77.partial").write_bytes(b"half")
    run(settings(), load_embedded(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in undisturbed.iterdir())
    assert outcome(tmp_path) == outcome(undisturbed)


def test_a_finished_run_is_left_alone(undisturbed: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.iterdir() if p.suffix != ".lock"}
    run(settings(), load_embedded(), undisturbed, lambda _: pytest.fail("trained again"))
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.iterdir() if p.suffix != ".lock"}


def test_other_settings_or_data_are_refused(undisturbed: Path, digits: Dataset) -> None:
    before = outcome(undisturbed)
    with pytest.raises(ValueError, match="other settings"):
        run(settings(seed=4), load_embedded(), undisturbed)
    other = dataclasses.replace(digits, checksums={"other": "0" * 64})
    with pytest.raises(ValueError, match="other data"):
        run(settings(), other, undisturbed)
    assert outcome(undisturbed) == before


def test_the_same_data_found_elsewhere_is_the_same(undisturbed: Path) -> None:
    before = outcome(undisturbed)
    run(settings(), dataclasses.replace(load_embedded(), source="cache", description="from the cache"), undisturbed)
    assert outcome(undisturbed) == before


def test_the_record_repeats_the_run_and_its_weights_score_what_it_says(undisturbed: Path) -> None:
    record = read_record(undisturbed)
    assert record.settings == settings()
    assert record.environment == describe_environment()
    assert record.data["source"] == "embedded"
    network = build_network(record.settings, load_embedded())
    network.load_state_dict(load_file(undisturbed / "weights.safetensors"))
    inputs = load_inputs(record.settings, load_embedded())
    # The weights are saved as training left them: with running averages.
    accuracy = evaluate(network, inputs.held_out_images, inputs.held_out_labels)[1]
    inference = record.result["inference"]
    assert accuracy == inference["running_average"] == record.metrics[-1]["accuracy"] == record.result["accuracy"]
    assert inference["recalibrated"] == inference["folded"]
    assert accuracy > 0.5  # it learned


def test_records_hold_no_place_and_no_name(undisturbed: Path) -> None:
    text = (undisturbed / "run.json").read_text()
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text
    assert str(Path(__file__).parent) not in text


def test_validation_comes_out_of_the_training_images(digits: Dataset) -> None:
    inputs = load_inputs(settings(data=DataSettings(validation=100)), digits)
    assert (len(inputs.train_images), len(inputs.held_out_images)) == (500, 100)

    def keys(images: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    test = keys((digits.test_images >= 128).float())
    both = keys(inputs.train_images) | keys(inputs.held_out_images)
    assert both == keys((digits.train_images >= 128).float())
    assert not keys(inputs.held_out_images) & (test - both)


def test_divergence_ends_a_run_and_is_recorded(digits: Dataset, tmp_path: Path) -> None:
    wild = settings(
        network=NetworkSettings((20,), "relu", weight_std=10.0), optimizer=OptimizerSettings(1e30), steps=1000
    )
    run(wild, digits, tmp_path)
    record = read_record(tmp_path)
    assert record.diverged
    assert record.result["steps"] < 1000
    assert "accuracy" not in record.result


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "result.json"])
def test_missing_and_damaged_records_are_named(name: str, undisturbed: Path, tmp_path: Path) -> None:
    for source in undisturbed.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_record(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_record(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "result.json"])
@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b"\xff\xfe\x00"])
def test_records_of_something_else_are_named(name: str, content: bytes, undisturbed: Path, tmp_path: Path) -> None:
    for source in undisturbed.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read_record(tmp_path)


def test_random_numbers_outside_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    build_network(settings(), load_embedded())
    assert torch.equal(before, torch.get_rng_state())


def test_metrics_are_plain_json(undisturbed: Path) -> None:
    code = "import json, sys; print(sum(1 for line in open(sys.argv[1]) if json.loads(line)))"
    command = [sys.executable, "-c", code, str(undisturbed / "metrics.jsonl")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(found) == json.loads((undisturbed / "result.json").read_text())["evaluations"]


def test_workers_find_the_folder_after_the_working_directory_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = settings(steps=10)
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        plan = {Path("runs") / name: short for name in ("a", "b")}
        run_all(plan, "runs", checksum=load_embedded().checksum, jobs=2, console=Console(quiet=True))
        assert all((tmp_path / place / folder / "result.json").is_file() for folder in plan)


def test_fewer_training_images_are_a_stratified_choice_of_the_seed() -> None:
    full = load_embedded()
    data = DataSettings(validation=1000, training_images=200)
    first, again, other = (load_inputs(settings(data=data, seed=seed), full) for seed in (3, 3, 4))
    assert torch.equal(first.train_images, again.train_images)
    assert not torch.equal(first.train_images, other.train_images)
    everything = load_inputs(settings(data=DataSettings(validation=1000)), full)
    assert torch.equal(first.held_out_images, everything.held_out_images)
    shares = everything.train_labels.bincount() / len(everything.train_labels) * 200
    assert (first.train_labels.bincount() - shares).abs().max() < 1
    known = {image.numpy().tobytes() for image in everything.train_images}
    assert all(image.numpy().tobytes() in known for image in first.train_images)
    # As many as there are, or more: all of them, in the order they had before the setting existed.
    for count in (3000, 10**6):
        same = load_inputs(settings(data=DataSettings(validation=1000, training_images=count)), full)
        assert torch.equal(same.train_images, everything.train_images)
    with pytest.raises(SettingsError, match="training_images is -1"):
        DataSettings(training_images=-1)
