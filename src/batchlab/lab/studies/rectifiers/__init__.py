"""What rectifiers and their first weights add, and whether batch norm makes them unnecessary (He et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from batchlab.lab.report import Table
from batchlab.lab.settings import DataSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies.comparison_study import Comparison, Finished, comparison_study
from batchlab.lab.studies.rectifiers.answer import answer
from batchlab.lab.studies.rectifiers.claims import claims
from batchlab.lab.studies.rectifiers.figures import figures
from batchlab.lab.studies.rectifiers.page import accuracy_table, build_page
from batchlab.lab.studies.rectifiers.settings import NORMALIZATIONS, SIZES, STARTS, RectifiersSettings, cell
from batchlab.lab.studies.rectifiers.summary import Summary, summarize

__all__ = ["COMPARISON", "STUDY"]


def arms(settings: RectifiersSettings) -> dict[str, RunSettings]:
    """Each network's run, by the network's name."""
    return {
        cell(name, depth, normalization): RunSettings(
            data=DataSettings(settings.dataset, binarize=False),
            network=NetworkSettings(
                (settings.width,) * depth, start.activation, normalization, initialization=start.initialization
            ),
            optimizer=OptimizerSettings(momentum=settings.momentum, schedule="linear", final=settings.final),
            batch_size=settings.batch_size,
            spacing=settings.spacing,
            probe_units=0,
            signal=True,
        )
        for normalization in NORMALIZATIONS
        for name, start in STARTS.items()
        for depth in settings.depths
    }


def _ending(finished: Finished, summary: Summary) -> tuple[str, Table, Sequence[str]]:
    title = "Test accuracy, each network at its own best rate"
    return title, accuracy_table(finished.settings, summary, ""), answer(finished.settings, summary)


COMPARISON: Final = Comparison(
    name="rectifiers",
    question="What do rectifiers and their initialization add, and does batch norm make them unnecessary?",
    settings=RectifiersSettings,
    sizes=SIZES,
    arms=arms,
    summarize=summarize,
    figures=figures,
    build_page=build_page,
    ending=_ending,
    claims=claims,
)

STUDY: Final = comparison_study(COMPARISON)
