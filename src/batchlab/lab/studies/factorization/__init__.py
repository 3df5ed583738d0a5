"""How much of batch norm's gain each factorization of Wu + b keeps (Salimans & Kingma 2016 and others)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from batchlab.lab.report import Table
from batchlab.lab.settings import DataSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies.comparison_study import Comparison, Finished, comparison_study
from batchlab.lab.studies.factorization.answer import answer
from batchlab.lab.studies.factorization.claims import claims
from batchlab.lab.studies.factorization.figures import figures
from batchlab.lab.studies.factorization.page import build_page, share_table
from batchlab.lab.studies.factorization.settings import ARMS, SIZES, FactorizationSettings, full_name
from batchlab.lab.studies.factorization.summary import Summary, summarize

__all__ = ["COMPARISON", "STUDY"]


def arms(settings: FactorizationSettings) -> dict[str, RunSettings]:
    """Each arm's run from each start, by the arm's name and the start's."""
    starts: dict[str, dict[str, Any]] = {
        "he": {"initialization": "he"},
        "small": {"initialization": "gaussian", "weight_std": settings.small_std},
    }
    shared = {
        "widths": settings.widths,
        "activation": "relu",
        "refresh_every": settings.refresh_every,
        "natural_eps": settings.natural_eps,
    }
    return {
        full_name(name, start): RunSettings(
            data=DataSettings(settings.dataset, binarize=False),
            network=NetworkSettings(**{**shared, **starts[start], **arm.network}),
            optimizer=OptimizerSettings(momentum=settings.momentum, algorithm=arm.algorithm),
            batch_size=settings.batch_size,
            spacing=settings.spacing,
            probe_units=0,
        )
        for start in settings.starts
        for name, arm in ARMS.items()
    }


def _ending(finished: Finished, summary: Summary) -> tuple[str, Table, Sequence[str]]:
    return (
        "How much of batch norm's gain each arm keeps",
        share_table(finished.settings, summary, ""),
        answer(finished.settings, summary),
    )


COMPARISON: Final = Comparison(
    name="factorization",
    question="Is there a better factorization of Wu + b, and how much of batch norm's gain does each keep?",
    settings=FactorizationSettings,
    sizes=SIZES,
    arms=arms,
    summarize=summarize,
    figures=figures,
    build_page=build_page,
    ending=_ending,
    claims=claims,
)

STUDY: Final = comparison_study(COMPARISON)
