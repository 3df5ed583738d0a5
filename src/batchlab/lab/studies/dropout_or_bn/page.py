"""The report of the study dropout-or-bn."""

from __future__ import annotations

from batchlab.lab.report import FigureBlock, Page, Table
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_or_bn.arms import named_arms
from batchlab.lab.studies.dropout_or_bn.settings import DropoutOrBnSettings
from batchlab.lab.studies.dropout_or_bn.summary import Summary
from batchlab.lab.studies.sections import footer, method_section
from batchlab.lab.studies.sentences import percent

__all__ = ["build_page", "error_table"]


def error_table(settings: DropoutOrBnSettings, summary: Summary, caption: str) -> Table:
    """Each arm's rate and test error."""
    labels = named_arms(settings)
    rows = [[labels[name].label, f"{summary.chosen[name]:g}", percent(e)] for name, e in summary.errors.items()]
    return Table(["network", "learning rate", "test error"], rows, caption)


def build_page(finished: Finished, summary: Summary, command: str, drawn: dict[str, str]) -> Page:
    """Put the report together; `drawn` are the figures."""
    environment = next(iter(finished.records.values())).environment
    return Page(
        title="Can batch norm replace dropout, and do they get on with each other?",
        question="Batch norm, dropout, both or neither: which recognizes most test images?",
        answer=[f"{name}: {percent(error)}" for name, error in summary.errors.items()],
        hero=FigureBlock(next(iter(drawn.values()), ""), ""),
        sections=[method_section("", command)],
        footer=footer(f"Data: {finished.data['description']}", environment, ""),
    )
