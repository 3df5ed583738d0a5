"""What a study is, and the folder it works in: one at a time, resumable, never mixed with another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from batchlab.lab.claims import Told
from batchlab.lab.data import Dataset
from batchlab.lab.files import locked, read_json, write_json
from batchlab.lab.records import describe_data
from batchlab.lab.report import Page, Table
from batchlab.lab.settings import from_dict, to_dict

__all__ = ["Outcome", "Study", "Workplace", "open_folder", "read_study"]

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Workplace:
    """Where and how a study runs.

    Args:
        folder: of the study's records and report.
        dataset: loaded and verified.
        data_folder: where the user said it is; None: searched for.
        jobs: parallel processes; None: as many as cores.
        console: for progress and tables.
    """

    folder: Path
    dataset: Dataset
    data_folder: Path | None
    jobs: int | None
    console: Console


@dataclass(frozen=True)
class Outcome:
    """What the records of a finished study say.

    Args:
        summary: its numbers, as plain values for summary.json.
        figures: name -> SVG.
        page: the report.
        title: of the console's table.
        table: for the console.
        answer: sentences for the console.
        told: the answer as numbers, to compare with the same study done again; None: nothing is random in it.
    """

    summary: Any
    figures: Mapping[str, str]
    page: Page
    title: str
    table: Table
    answer: Sequence[str]
    told: Told | None = None


@dataclass(frozen=True)
class Study:
    """A question, and the functions that answer it.

    Args:
        name: on the command line.
        question: one line.
        settings: the dataclass of its settings.
        sizes: named settings: "full", "demo" and "quick" at least.
        run: does the runs that are missing and writes the report into the workplace's folder; returns its path.
        read: what the records in a folder say; raises ValueError if runs are missing or damaged.
        report: writes the report again from the records in a folder; returns its path.
    """

    name: str
    question: str
    settings: type[Any]
    sizes: Mapping[str, Any]
    run: Callable[[Any, Workplace], Path]
    read: Callable[[Path], Outcome]
    report: Callable[[Path, Console], Path]


@contextmanager
def open_folder(folder: Path, study: Study, settings: Any, dataset: Dataset) -> Iterator[None]:
    """Make or reopen a study's folder, and keep other processes out of it while the body works.

    Raises:
        ValueError: the folder holds another study, other settings or other data, or other files.
        FolderInUseError: another process works in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder with --out")
    present = {entry.name for entry in folder.iterdir()} - {"study.lock"} if folder.is_dir() else set()
    if present and STUDY_FILE not in present:
        raise ValueError(f"{folder} is not empty and holds no study: choose a new folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "study": study.name,
        "settings": to_dict(settings),
        "data": describe_data(dataset) | {"training_images": len(dataset.train_images)},
    }
    with locked(folder, "study"):
        path = folder / STUDY_FILE
        if path.is_file():
            _refuse_mixture(folder, read_study_file(folder), content, study)
        else:
            write_json(path, content)
        yield


def read_study_file(folder: Path) -> dict[str, Any]:
    """What study.json in a folder says: study, settings, data.

    Raises:
        ValueError: it is damaged.
    """
    content = read_json(folder / STUDY_FILE)
    if not (
        isinstance(content, dict)
        and isinstance(content.get("study"), str)
        and all(isinstance(content.get(key), dict) for key in ("settings", "data"))
    ):
        raise ValueError(
            f"{folder / STUDY_FILE} is damaged: it does not say study, settings and data. Restore it, or choose "
            "another folder."
        )
    return content


def _refuse_mixture(folder: Path, earlier: Any, now: dict[str, Any], study: Study) -> None:
    differences = []
    old, new = earlier.get("settings", {}), now["settings"]
    if earlier.get("study") != now["study"]:
        differences.append(f"study: {earlier.get('study')!r}, not {now['study']!r}")
    else:
        # A folder from before a setting existed was made with what is now its default.
        old = to_dict(from_dict(old, study.settings))
    differences += [f"settings.{k}: {old.get(k)!r}, not {v!r}" for k, v in new.items() if old.get(k) != v]
    # Where the data was found may change from one day to the next; what it is may not.
    if earlier.get("data", {}).get("checksum") != now["data"]["checksum"]:
        differences.append(f"data: {earlier.get('data', {}).get('description')}, not {now['data']['description']}")
    if differences:
        raise ValueError(
            f"{folder} holds a study with other settings ({'; '.join(differences)}): repeat the command it was started "
            "with to finish it, choose another folder with --out, or delete this one"
        )


def read_study(folder: Path, kind: type[Any]) -> tuple[Any, dict[str, Any]]:
    """The settings of the study in `folder`, and what study.json says of its data."""
    content = read_study_file(folder)
    return from_dict(content["settings"], kind), content["data"]
