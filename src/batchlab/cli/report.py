"""`batchlab report DIR`: the report again, from the records; of several studies, one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from batchlab.cli.options import File
from batchlab.lab.files import locked
from batchlab.lab.studies import STUDIES
from batchlab.lab.studies.collection import collect, find_studies
from batchlab.lab.study import STUDY_FILE, read_study_file

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Write the report of a finished study again, from the records in its folder; of several studies, one page."""

    folders: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR [DIR ...]", help_behavior_hint="")]
    ]
    """Folder of a study (what --out was); or several, or a folder with several in it, for one page of them all."""
    out: File = None
    """File of the page of several studies. Without it: report.html in the folder, or here if there are several."""

    def execute(self, console: Console, errors: Console) -> int:  # noqa: ARG002
        """Write report.html (and for a single study figures and summary.json); the records stay as they are."""
        if not self.folders:
            raise ValueError("no folder is given: pass a study's --out folder, or several")
        found = find_studies(self.folders)
        if found != list(self.folders) or len(found) > 1 or self.out is not None:
            parent = self.folders[0] if len(self.folders) == 1 and found != list(self.folders) else Path()
            collect(found, STUDIES, self.out or parent / "report.html", console)
            return 0
        folder = found[0]
        name = read_study_file(folder)["study"]
        if name not in STUDIES:
            raise ValueError(
                f"{folder / STUDY_FILE} names the study {name!r}, which this version does not know: "
                f"{', '.join(STUDIES)}"
            )
        with locked(folder, "study"):
            STUDIES[name].report(folder, console)
        return 0
