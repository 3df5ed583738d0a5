"""How a study ends on the console: the table, the answer, and where the report is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as ConsoleTable

from batchlab.lab.report import Table

__all__ = ["command_for", "print_ending"]


def command_for(name: str, settings: Any, sizes: Mapping[str, Any]) -> str:
    """The words that start a study again; `sizes` are its named settings.

    Data set, number of seeds and the first of them are options of the command. Targets follow from the data set.
    """
    own = {field.name for field in fields(settings)}
    asked = {option: getattr(settings, option) for option in ("seeds", "first_seed", "dataset") if option in own}
    targets = {"targets": ()} if "targets" in own else {}
    for size, named in sizes.items():
        if replace(named, **asked, **targets) == settings:
            words = [f"batchlab study {name}", *([f"--size {size}"] if size != "full" else [])]
            changed = {option: value for option, value in asked.items() if value != getattr(named, option)}
            words += [f"--{option.replace('_', '-')} {value}" for option, value in changed.items()]
            return " ".join(words)
    return f"batchlab study {name} --settings SETTINGS.toml   # the settings are in study.json"


def print_ending(console: Console, title: str, table: Table, sentences: Sequence[str], folder: Path) -> None:
    """Print a study's table, its answer and the path of its report."""
    shown = ConsoleTable(title=title)
    for index, name in enumerate(table.header):
        shown.add_column(name, justify="left" if index == 0 else "right")
    for row in table.rows:
        shown.add_row(*row)
    console.print()
    console.print(shown)
    for sentence in sentences:
        console.print(sentence, highlight=False)
    console.print()
    console.print("The report, with all figures:", highlight=False)
    console.print(
        f"  {(folder / 'report.html').resolve()}", style="bold", highlight=False, soft_wrap=True, markup=False
    )
