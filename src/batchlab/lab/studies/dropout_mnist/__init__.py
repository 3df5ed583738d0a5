"""A large network with dropout against a small one, and two kinds of dropout (Graham et al. 2015, section 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from batchlab.lab.report import Table
from batchlab.lab.studies.comparison_study import Comparison, Finished, comparison_study
from batchlab.lab.studies.dropout_mnist.answer import answer
from batchlab.lab.studies.dropout_mnist.claims import claims
from batchlab.lab.studies.dropout_mnist.page import build_page, error_table, figures
from batchlab.lab.studies.dropout_mnist.plan import arms
from batchlab.lab.studies.dropout_mnist.settings import SIZES, DropoutMnistSettings
from batchlab.lab.studies.dropout_mnist.summary import Summary, summarize

__all__ = ["COMPARISON", "STUDY"]


def _ending(finished: Finished, summary: Summary) -> tuple[str, Table, Sequence[str]]:
    title = "Test error, each arm at its own best rate"
    return title, error_table(summary, ""), answer(finished.settings, summary)


COMPARISON: Final = Comparison(
    name="dropout-mnist",
    question="Does dropout that never computes what it drops learn as well? 2 x 80 and 2 x 800 units on MNIST.",
    settings=DropoutMnistSettings,
    sizes=SIZES,
    arms=arms,
    summarize=summarize,
    figures=figures,
    build_page=build_page,
    ending=_ending,
    claims=claims,
)

STUDY: Final = comparison_study(COMPARISON)
