"""`batchlab studies`: what there is."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from batchlab.lab.studies import STUDIES

__all__ = ["Studies"]


@dataclass(frozen=True)
class Studies:
    """List the studies, one line each."""

    def execute(self, console: Console, errors: Console) -> int:  # noqa: ARG002
        """Print them."""
        for name, study in STUDIES.items():
            console.print(f"[bold]{name}[/bold]  {study.question}", highlight=False, soft_wrap=True)
        return 0
