"""`batchlab compare DIR AGAIN`: does a study that was done again say the same?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from batchlab.cli.options import File
from batchlab.lab.claims import comparison_table, count, markdown, read_claims
from batchlab.lab.files import write_text

__all__ = ["Compare"]


@dataclass(frozen=True)
class Compare:
    """Compare what a study claims with the same study done again, with other seeds or data."""

    folders: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR AGAIN [AGAIN ...]", help_behavior_hint="")]
    ]
    """Folder of the study, then of each time it was done again."""
    out: File = None
    """Markdown file to write the table to as well."""

    def execute(self, console: Console, errors: Console) -> int:  # noqa: ARG002
        """Print each claim as every folder has it, and how many hold."""
        if len(self.folders) < 2:
            raise ValueError("pass two folders or more: a study's, and that of the same study done again")
        told = [read_claims(folder) for folder in self.folders]
        table = comparison_table(told)
        sentences = [count(told[0], other) for other in told[1:]]
        shown = Table(title=f"{told[0].study}: the same again?", show_lines=True)
        for column in table.header:
            shown.add_column(column)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        for sentence in sentences:
            console.print(sentence, highlight=False)
        if self.out is not None:
            write_text(self.out, markdown(told))
            console.print(f"Written: {self.out}", highlight=False, markup=False, soft_wrap=True)
        return 0
