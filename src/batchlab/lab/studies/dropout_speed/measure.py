"""Measuring the points of the study dropout-speed: a record for each width and batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from batchlab.lab.data import Dataset
from batchlab.lab.dropout_timing import Network, TrainingStep, mlp, parameter_bytes, step_flops
from batchlab.lab.files import read_json, write_json
from batchlab.lab.records import describe_environment
from batchlab.lab.settings import SettingsError
from batchlab.lab.studies.dropout_speed.settings import DropoutSpeedSettings
from batchlab.lab.timing import calls_for, one_thread, take_turns
from batchlab.lab.training import prepare_images

__all__ = [
    "ARMS",
    "Point",
    "check_settings",
    "expected_work",
    "measure_point",
    "network",
    "plan",
    "read_point",
    "refuse_other_machines",
    "write_point",
]

ARMS: Final[dict[str, str]] = {
    "none": "no dropout",
    "independent": "independent dropout",
    "batchwise": "batchwise dropout",
    "small": "the small network",
}

BATCHES: Final = 10
"""So many different batches take turns."""


@dataclass(frozen=True)
class Point:
    """What was measured at one width and batch size.

    Args:
        width: units of each hidden layer.
        batch_size: images in a step.
        steps_per_turn: of which each measurement is the mean.
        seconds: of a training step: arm -> a measurement for each round.
        environment: versions and machine.
    """

    width: int
    batch_size: int
    steps_per_turn: int
    seconds: dict[str, list[float]]
    environment: dict[str, Any]


def network(settings: DropoutSpeedSettings, width: int) -> Network:
    """The network with dropout, of a width."""
    return mlp((width,) * settings.hidden_layers, input_rate=settings.input_rate, rate=settings.rate)


def plan(settings: DropoutSpeedSettings) -> dict[str, tuple[int, int]]:
    """File of each point in the study's folder -> width and batch size; the quick ones first."""
    pairs = [(width, batch_size) for width in settings.widths for batch_size in settings.batch_sizes]
    pairs.sort(key=lambda pair: expected_work(settings, *pair))
    return {f"points/width{width}-batch{batch_size}.json": (width, batch_size) for width, batch_size in pairs}


def expected_work(settings: DropoutSpeedSettings, width: int, batch_size: int) -> float:
    """About how long a point takes, in no particular unit; for the progress bar and the order."""
    whole = network(settings, width)
    # Ten operations in the time that a byte of weights takes in an optimizer's step, and a turn's least time.
    return step_flops(whole, batch_size) + 10 * parameter_bytes(whole) + 5e10 * settings.turn_seconds


def check_settings(settings: DropoutSpeedSettings, dataset: Dataset) -> None:
    """Refuse settings that these data cannot serve.

    Raises:
        SettingsError: a batch is larger than the training set.
    """
    largest, there = max(settings.batch_sizes), len(dataset.train_images)
    if largest > there:
        raise SettingsError(f"batch_sizes has {largest}; allowed: up to {there:,}, the training images that there are")


def measure_point(
    settings: DropoutSpeedSettings, dataset: Dataset, width: int, batch_size: int, on_round: Callable[[], Any]
) -> Point:
    """Time all arms at one width and batch size, in turns, on one thread."""
    count = batch_size * min(BATCHES, len(dataset.train_images) // batch_size)
    images = prepare_images(dataset.train_images[:count], binarize=False).flatten(1)
    labels = dataset.train_labels[:count]
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = network(settings, width)
        # The dense arms have torch's fastest optimizer, so that none of the difference is owed to a slow one.
        steps = {arm: TrainingStep(whole, arm, images, labels, batch_size, fused=True) for arm in ARMS}
        calls, _ = calls_for(steps, settings.turn_seconds)
        times = take_turns(steps, settings.rounds, calls=calls, warm_up=0, on_round=on_round)
    rounded = {arm: [float(f"{value:.4g}") for value in values] for arm, values in times.items()}
    return Point(width, batch_size, calls, rounded, describe_environment())


def write_point(path: Path, point: Point) -> None:
    """Write a point's record; it is there as a whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    content = {
        "width": point.width,
        "batch_size": point.batch_size,
        "steps_per_turn": point.steps_per_turn,
        "seconds_per_step": point.seconds,
        "environment": point.environment,
    }
    write_json(path, content)


def read_point(path: Path, settings: DropoutSpeedSettings) -> Point:
    """Read a point's record.

    Raises:
        ValueError: it is missing or damaged; names the file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: the study is not finished; run it again to finish it")
    content = read_json(path)
    try:
        seconds = {arm: [float(value) for value in content["seconds_per_step"][arm]] for arm in ARMS}
        point = Point(
            int(content["width"]),
            int(content["batch_size"]),
            int(content["steps_per_turn"]),
            seconds,
            dict(content["environment"]),
        )
        whole = all(len(values) == settings.rounds and min(values) > 0 for values in seconds.values())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete it and run the study again") from error
    if not whole:
        raise ValueError(f"{path} is damaged (not {settings.rounds} times above 0): delete it and run the study again")
    return point


def refuse_other_machines(folder: Path, points: Sequence[Point]) -> None:
    """Times of two machines, or of two versions, do not belong into one figure.

    Raises:
        ValueError: some of the points were measured elsewhere; says what differs.
    """
    now = describe_environment()
    for point in points:
        there = point.environment
        differences = [f"{key}: {there.get(key)}, not {value}" for key, value in now.items() if there.get(key) != value]
        if differences:
            raise ValueError(
                f"{folder} has points that were measured elsewhere ({'; '.join(differences)}): finish the study where "
                "it was started, choose another folder with --out, or delete this one"
            )
