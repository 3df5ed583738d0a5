"""Each arm's own learning rate, chosen on held-out training images: the same care for every arm of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from batchlab.lab.comparison import final_score
from batchlab.lab.records import RunRecord

__all__ = ["SEARCH_SEED", "Scores", "choose_rates", "run_name"]

SEARCH_SEED = 1000  # the search's seeds start here, so that no final run was chosen by its own luck

Scores = dict[str, dict[float, list[float]]]
"""Arm -> rate -> validation accuracy of each seed."""


def run_name(stage: str, arm: str, rate: float, seed: int) -> str:
    """The folder of a run, under the study's."""
    return f"runs/{stage}/{arm}-rate{rate:g}-seed{seed}"


def choose_rates(
    arms: Iterable[str], rates: Iterable[float], seeds: int, records: Mapping[str, RunRecord]
) -> tuple[dict[str, float], Scores]:
    """Each arm's best rate, and all scores: the mean validation accuracy over the last fifth of the steps.

    A run that diverged scores 0; of equal rates the smaller wins.
    """
    ordered = sorted(rates)
    scores = {
        name: {
            rate: [
                final_score(records[run_name("search", name, rate, seed)])
                for seed in range(SEARCH_SEED, SEARCH_SEED + seeds)
            ]
            for rate in ordered
        }
        for name in arms
    }

    def best(found: Mapping[float, Sequence[float]]) -> float:
        return max(found, key=lambda rate: (sum(found[rate]), -rate))

    return {name: best(found) for name, found in scores.items()}, scores
