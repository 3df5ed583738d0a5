"""What centering, rescaling and whitening each contribute (Ioffe & Szegedy 2015; Huang et al. 2018, 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from batchlab.lab.report import Table
from batchlab.lab.settings import DataSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies.arm_results import arm_figures, steps_table
from batchlab.lab.studies.comparison_study import Comparison, Finished, comparison_study
from batchlab.lab.studies.whitening.claims import claims
from batchlab.lab.studies.whitening.page import build_page
from batchlab.lab.studies.whitening.settings import ARMS, SIZES, WhiteningSettings
from batchlab.lab.studies.whitening.summary import Summary, answer, summarize

__all__ = ["COMPARISON", "STUDY"]


def arms(settings: WhiteningSettings) -> dict[str, RunSettings]:
    """Each arm's run, by the arm's name."""
    return {
        name: RunSettings(
            data=DataSettings(settings.dataset, binarize=False),
            network=NetworkSettings(settings.widths, "sigmoid", name, settings.weight_std),
            optimizer=OptimizerSettings(momentum=settings.momentum),
            batch_size=settings.batch_size,
            spacing=settings.spacing,
            probe_units=0,
        )
        for name in ARMS
    }


def _figures(finished: Finished, summary: Summary) -> dict[str, str]:
    return arm_figures(finished, ARMS, summary.scores, floor=min(finished.settings.targets) - 0.1)


def _ending(finished: Finished, summary: Summary) -> tuple[str, Table, Sequence[str]]:
    title = "Steps to a test accuracy, each arm at its own best rate"
    return title, steps_table(summary.results, ARMS, ""), answer(finished.settings, summary)


COMPARISON: Final = Comparison(
    name="whitening",
    question="What do centering, rescaling and whitening each contribute to batch normalization?",
    settings=WhiteningSettings,
    sizes=SIZES,
    arms=arms,
    summarize=summarize,
    figures=_figures,
    build_page=build_page,
    ending=_ending,
    claims=claims,
)

STUDY: Final = comparison_study(COMPARISON)
