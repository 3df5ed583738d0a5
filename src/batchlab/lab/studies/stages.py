"""What every study of runs does: finish a plan's runs, and write what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from batchlab.lab.claims import CLAIMS_FILE, write_claims
from batchlab.lab.execution import run_all
from batchlab.lab.figures import standalone
from batchlab.lab.files import write_json, write_text
from batchlab.lab.records import RunRecord, read_record
from batchlab.lab.report import write_page
from batchlab.lab.settings import RunSettings
from batchlab.lab.studies.ending import print_ending
from batchlab.lab.studies.settings import ComparisonSettings
from batchlab.lab.study import Outcome, Workplace

__all__ = ["complete", "to_json", "told_title", "write_report"]


def complete(workplace: Workplace, plan: Mapping[str, RunSettings], title: str) -> dict[str, RunRecord]:
    """Do the runs of `plan` (name in the study's folder -> settings) that are missing; return the records of all."""
    run_all(
        {workplace.folder / name: run for name, run in plan.items()},
        title,
        checksum=workplace.dataset.checksum,
        data_folder=workplace.data_folder,
        jobs=workplace.jobs,
        console=workplace.console,
    )
    return {name: read_record(workplace.folder / name) for name in plan}


def to_json(summary: Any) -> dict[str, Any]:
    """Plain values of a summary (a dataclass); an interval that one seed cannot give is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and value != value else value

    found: dict[str, Any] = plain(asdict(summary))
    return found


def told_title(settings: ComparisonSettings, data: Mapping[str, Any]) -> str:
    """Data and seeds in a few words: full MNIST, seeds 0 to 4."""
    first, last = settings.final_seeds[0], settings.final_seeds[-1]
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    return f"{str(data['description']).split(', ')[0]}, {seeds}"


def write_report(read: Callable[[Path], Outcome], folder: Path, console: Console) -> Path:
    """Write report, figures and numbers into a study's folder, print how it ends, and return the report's path.

    Args:
        read: the study's own.
        folder: with its records.
        console: for the table and the answer.
    """
    with console.status("writing the report"):
        outcome = read(folder)
        write_json(folder / "summary.json", outcome.summary)
        (folder / "figures").mkdir(exist_ok=True)
        for name, svg in outcome.figures.items():
            write_text(folder / "figures" / f"{name}.svg", standalone(svg))
        if outcome.told is not None:
            write_claims(outcome.told, folder / CLAIMS_FILE)
        write_page(outcome.page, folder / "report.html")
    print_ending(console, outcome.title, outcome.table, outcome.answer, folder)
    return folder / "report.html"
