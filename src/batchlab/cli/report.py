"""`batchlab report DIR`: the report again, from the records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from batchlab.lab.files import locked, read_json
from batchlab.lab.studies import STUDIES
from batchlab.lab.study import STUDY_FILE

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Write the report of a finished study again, from the records in its folder."""

    folder: tyro.conf.Positional[Path]
    """Folder of the study (what --out was)."""

    def execute(self, console: Console, errors: Console) -> int:  # noqa: ARG002
        """Write report.html, the figures and summary.json; the records stay as they are."""
        path = self.folder / STUDY_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder} holds no study (there is no {STUDY_FILE}): pass a study's --out folder"
            )
        name = read_json(path).get("study")
        if name not in STUDIES:
            raise ValueError(f"{path} names the study {name!r}, which this version does not know: {', '.join(STUDIES)}")
        with locked(self.folder, "study"):
            STUDIES[name].report(self.folder, console)
        return 0
