"""Does batch norm reduce internal covariate shift, and if not, what does it do (Santurkar et al. 2018)?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from batchlab.lab.report import Table
from batchlab.lab.settings import DataSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies.comparison_study import Comparison, Finished, comparison_study
from batchlab.lab.studies.why.answer import answer, verdict_table
from batchlab.lab.studies.why.claims import claims
from batchlab.lab.studies.why.figures import figures
from batchlab.lab.studies.why.page import build_page
from batchlab.lab.studies.why.settings import NETWORKS, NORMALIZATIONS, SIZES, WhySettings, arm_of
from batchlab.lab.studies.why.summary import Summary, further_pairs, summarize

__all__ = ["COMPARISON", "STUDY"]


def _network(settings: WhySettings, activation: str, normalization: str) -> NetworkSettings:
    if activation == "sigmoid":
        return NetworkSettings(settings.widths, activation, normalization, settings.weight_std)
    return NetworkSettings(settings.relu_widths, activation, normalization, initialization="he")


def arms(settings: WhySettings) -> dict[str, RunSettings]:
    """Each arm's run, by the arm's name."""
    return {
        arm_of(network, normalization): RunSettings(
            data=DataSettings(settings.dataset, binarize=False),
            network=_network(settings, network, normalization),
            optimizer=OptimizerSettings(momentum=settings.momentum),
            batch_size=settings.batch_size,
            spacing=settings.spacing,
            probe_units=0,
            landscape=True,
        )
        for network in NETWORKS
        for normalization in NORMALIZATIONS
    }


def _ending(finished: Finished, summary: Summary) -> tuple[str, Table, Sequence[str]]:
    return "What the paper says, and what was found", verdict_table(summary, ""), answer(finished.settings, summary)


COMPARISON: Final = Comparison(
    name="why",
    question="Does batch norm reduce internal covariate shift at all, and if not, what does it do instead?",
    settings=WhySettings,
    sizes=SIZES,
    arms=arms,
    summarize=summarize,
    figures=figures,
    build_page=build_page,
    ending=_ending,
    claims=claims,
    also=further_pairs,
)

STUDY: Final = comparison_study(COMPARISON)
