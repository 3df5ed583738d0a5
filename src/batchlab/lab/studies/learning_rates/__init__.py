"""How large a learning rate a network stands, with and without each mechanism (Ioffe & Szegedy 2015, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from batchlab.lab.report import Table
from batchlab.lab.settings import DataSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies.comparison_study import Comparison, Finished, comparison_study
from batchlab.lab.studies.learning_rates.answer import answer
from batchlab.lab.studies.learning_rates.claims import claims
from batchlab.lab.studies.learning_rates.figures import figures
from batchlab.lab.studies.learning_rates.page import build_page, range_table
from batchlab.lab.studies.learning_rates.settings import (
    ACTIVATIONS,
    MECHANISMS,
    SIZES,
    LearningRatesSettings,
    arm,
)
from batchlab.lab.studies.learning_rates.summary import Summary, summarize

__all__ = ["COMPARISON", "STUDY"]


def arms(settings: LearningRatesSettings) -> dict[str, RunSettings]:
    """Each arm's run, by the arm's name."""
    return {
        arm(activation, mechanism): RunSettings(
            data=DataSettings(settings.dataset, binarize=False),
            network=NetworkSettings(
                settings.widths,
                activation,
                MECHANISMS[mechanism][1],
                settings.weight_std,
                initialization="gaussian" if activation == "sigmoid" else "he",
                factorization=MECHANISMS[mechanism][2],
            ),
            optimizer=OptimizerSettings(momentum=settings.momentum),
            batch_size=settings.batch_size,
            evaluate_every=settings.evaluate_every,
            probe_units=0,
            weight_growth=True,
            inference=False,
        )
        for activation in settings.activations
        for mechanism in ACTIVATIONS[activation][1]
    }


def _ending(finished: Finished, summary: Summary) -> tuple[str, Table, Sequence[str]]:
    settings: LearningRatesSettings = finished.settings
    first = settings.activations[0]
    title = f"Learning rates that train, {ACTIVATIONS[first][0]} units"
    return title, range_table(settings, summary.conditions[first], ""), answer(settings, summary)


COMPARISON: Final = Comparison(
    name="learning-rates",
    question="How large a learning rate can a network stand, with and without each mechanism?",
    settings=LearningRatesSettings,
    sizes=SIZES,
    arms=arms,
    summarize=summarize,
    figures=figures,
    build_page=build_page,
    ending=_ending,
    claims=claims,
)

STUDY: Final = comparison_study(COMPARISON)
