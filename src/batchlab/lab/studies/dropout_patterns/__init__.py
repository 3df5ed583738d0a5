"""How patterns of batchwise dropout are drawn, and how many it takes (Graham et al. 2015, sections 2 and 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from batchlab.lab.report import Table
from batchlab.lab.studies.comparison_study import Comparison, Finished, comparison_study
from batchlab.lab.studies.dropout_patterns.claims import claims
from batchlab.lab.studies.dropout_patterns.page import answer, build_page, error_table, figures
from batchlab.lab.studies.dropout_patterns.plan import arms
from batchlab.lab.studies.dropout_patterns.settings import SIZES, DropoutPatternsSettings
from batchlab.lab.studies.dropout_patterns.summary import Summary, summarize

__all__ = ["COMPARISON", "STUDY"]


def _ending(finished: Finished, summary: Summary) -> tuple[str, Table, Sequence[str]]:
    title = "Test error, each arm at its own best rate"
    return title, error_table(summary, ""), answer(finished.settings, summary)


COMPARISON: Final = Comparison(
    name="dropout-patterns",
    question="How many different patterns does batchwise dropout need, and does it matter how they are drawn?",
    settings=DropoutPatternsSettings,
    sizes=SIZES,
    arms=arms,
    summarize=summarize,
    figures=figures,
    build_page=build_page,
    ending=_ending,
    claims=claims,
)

STUDY: Final = comparison_study(COMPARISON)
