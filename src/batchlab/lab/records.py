"""Run records: what was run, on what, and what came out; enough to repeat a run, and small enough to commit.

A run's folder holds
    run.json         settings, data (name, source, checksum), environment (versions, commit, machine)
    metrics.jsonl    one line an evaluation, in order
    result.json      how it ended; written last, so a folder with it is a finished run
    timing.json      seconds of training, by the clock and of the processor; all that differs when a run is repeated
    weights.safetensors   the final weights (not committed)
    checkpoint.pt    where an interrupted run goes on (removed at the end)
"""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import batchlab
from batchlab.lab.data import Dataset
from batchlab.lab.files import read_json
from batchlab.lab.settings import RunSettings, from_dict, to_dict

__all__ = ["RunRecord", "describe_data", "describe_environment", "describe_run", "read_metrics", "read_record"]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def _commit() -> str:
    """The commit of the checkout the package is imported from, "+" if it has changes; empty outside of one."""
    source = Path(batchlab.__file__).parent
    try:
        command = ["git", "-C", str(source), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        tracked = subprocess.run(
            ["git", "-C", str(source), "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    # A virtual environment may lie in somebody else's repository, whose commit would say nothing about batchlab.
    return found if tracked.returncode == 0 else ""


@cache
def describe_environment() -> dict[str, Any]:
    """Versions and machine, without names of hosts, users or folders."""
    return {
        "batchlab": batchlab.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
    }


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """Which data, where it was found (not in which folder), and its checksum."""
    return {
        "name": dataset.name,
        "source": dataset.source,
        "description": dataset.description,
        "checksum": dataset.checksum,
    }


def describe_run(settings: RunSettings, dataset: Dataset) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "settings": to_dict(settings),
        "data": describe_data(dataset) | {"evaluated_on": "validation" if settings.data.validation else "test"},
        "environment": describe_environment(),
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, up to the first incomplete one (a run may be writing, or have been killed)."""
    metrics: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return metrics
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return metrics


@dataclass(frozen=True)
class RunRecord:
    """A finished run, as read from its folder.

    Args:
        name: the folder's name.
        settings: of the run.
        data: name, source, checksum, and what was evaluated on.
        environment: versions and machine.
        metrics: a dictionary for each evaluation: step, train_loss, loss, accuracy, percentiles.
        result: status and final numbers.
        timing: seconds.
    """

    name: str
    settings: RunSettings
    data: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    timing: dict[str, Any]

    @property
    def diverged(self) -> bool:
        """Whether the loss became inf or NaN, which ended the run early."""
        return bool(self.result["status"] == "diverged")

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """Steps and accuracy at each evaluation."""
        return [line["step"] for line in self.metrics], [line["accuracy"] for line in self.metrics]


def read_record(folder: Path) -> RunRecord:
    """Read a finished run.

    Raises:
        ValueError: a file is missing or damaged; names it.
    """
    for name in ("run.json", "metrics.jsonl", "result.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: the run is not finished; run its study again to finish it")
    run, result = read_json(folder / "run.json"), read_json(folder / "result.json")
    timing = read_json(folder / "timing.json") if (folder / "timing.json").is_file() else {}
    try:
        metrics, expected = read_metrics(folder / "metrics.jsonl"), result["evaluations"]
        settings = from_dict(run["settings"], RunSettings)
        record = RunRecord(folder.name, settings, run["data"], run["environment"], metrics, result, timing)
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{folder} has a damaged record ({type(error).__name__}: {error}). Delete it and run the study again."
        ) from error
    if len(metrics) != expected:
        raise ValueError(
            f"{folder / 'metrics.jsonl'} is damaged: {len(metrics)} whole lines instead of {expected}. "
            "Delete the run's folder and run the study again."
        )
    return record
