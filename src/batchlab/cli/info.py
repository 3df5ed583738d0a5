"""`batchlab info`: what a bug report needs, and what serves on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps

from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchlab.lab.installation import describe_installation

__all__ = ["Info"]


@dataclass(frozen=True)
class Info:
    """Show what a bug report needs, and what serves on this machine. Compiles and changes nothing."""

    json: bool = False
    """The same as JSON, for programs."""

    def execute(self, console: Console, errors: Console) -> int:  # noqa: ARG002
        """Print versions, machine, GPUs, kernels, data and optional parts."""
        found = describe_installation()
        if self.json:
            text = dumps(found, indent=2, ensure_ascii=False)
            console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)
            return 0
        table = Table(show_header=False)
        for style in ("bold", "", ""):
            table.add_column(style=style, overflow="fold")
        for section, facts in found.items():
            for number, (label, text) in enumerate((facts or {"none": ""}).items()):
                table.add_row(section if number == 0 else "", Text(label), Text(text))
            table.add_section()
        console.print(table)
        return 0
