"""What every study of runs does: finish a plan's runs, and write what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batchlab.lab.execution import run_all
from batchlab.lab.figures import standalone
from batchlab.lab.files import write_json, write_text
from batchlab.lab.records import RunRecord, read_record
from batchlab.lab.report import Page, write_page
from batchlab.lab.settings import RunSettings
from batchlab.lab.study import Workplace

__all__ = ["complete", "to_json", "write_outcome"]


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


def write_outcome(folder: Path, summary: Any, drawn: Mapping[str, str], page: Page) -> None:
    """Write summary.json, the figures and report.html into a study's folder."""
    write_json(folder / "summary.json", summary)
    (folder / "figures").mkdir(exist_ok=True)
    for name, svg in drawn.items():
        write_text(folder / "figures" / f"{name}.svg", standalone(svg))
    write_page(page, folder / "report.html")
