"""Batch norm, dropout, both and neither (Ioffe & Szegedy 2015, section 4.2.1; Li et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from batchlab.lab.report import Table
from batchlab.lab.studies.comparison_study import Comparison, Finished, comparison_study
from batchlab.lab.studies.dropout_or_bn.answer import answer
from batchlab.lab.studies.dropout_or_bn.arms import arms
from batchlab.lab.studies.dropout_or_bn.claims import claims
from batchlab.lab.studies.dropout_or_bn.figures import figures
from batchlab.lab.studies.dropout_or_bn.page import build_page, error_table
from batchlab.lab.studies.dropout_or_bn.settings import SIZES, DropoutOrBnSettings
from batchlab.lab.studies.dropout_or_bn.summary import Summary, summarize

__all__ = ["COMPARISON", "STUDY"]


def _ending(finished: Finished, summary: Summary) -> tuple[str, Table, Sequence[str]]:
    return (
        "Test error, each network at its own best rate",
        error_table(finished.settings, summary, ""),
        answer(finished.settings, summary),
    )


COMPARISON: Final = Comparison(
    name="dropout-or-bn",
    question="Can batch norm replace dropout, and do they get on with each other?",
    settings=DropoutOrBnSettings,
    sizes=SIZES,
    arms=arms,
    summarize=summarize,
    figures=figures,
    build_page=build_page,
    ending=_ending,
    claims=claims,
)

STUDY: Final = comparison_study(COMPARISON)
