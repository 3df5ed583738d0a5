"""Each arm's own learning rate, chosen on held-out training images: the same care for every arm of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from batchlab.lab.comparison import final_score
from batchlab.lab.records import RunRecord
from batchlab.lab.settings import RunSettings, SettingsError
from batchlab.lab.studies.settings import ComparisonSettings

__all__ = ["Arms", "Scores", "arm_records", "choose_rates", "final_plan", "run_name", "search_plan"]

Arms = Mapping[str, RunSettings]
"""Arm -> its run on test images; rate, seed and steps are filled in by the plans."""

Scores = dict[str, dict[float, list[float]]]
"""Arm -> rate -> validation accuracy of each seed."""


def run_name(stage: str, arm: str, rate: float, seed: int) -> str:
    """The folder of a run, under the study's."""
    return f"runs/{stage}/{arm}-rate{rate:g}-seed{seed}"


def _at(arm: RunSettings, rate: float, seed: int, steps: int) -> RunSettings:
    return replace(arm, optimizer=replace(arm.optimizer, learning_rate=rate), seed=seed, steps=steps)


def search_plan(settings: ComparisonSettings, arms: Arms, training_images: int) -> dict[str, RunSettings]:
    """Every arm at each of its rates, evaluated on a validation split of the training images; never on test images."""
    validation = round(training_images * settings.held_out_share)
    if not 0 < validation < training_images:  # with none the search would look at test images
        raise SettingsError(
            f"held_out_share is {settings.held_out_share}: of {training_images:,} training images that holds out "
            f"{validation:,}; rates are chosen on 1 or more, and trained on 1 or more"
        )
    tried = dict.fromkeys(rate for name in arms for rate in settings.rates_of(name))
    return {
        run_name("search", name, rate, seed): replace(
            _at(arm, rate, seed, settings.search_steps),
            data=replace(arm.data, validation=validation),
            probe_units=0,
            landscape=False,
        )
        for rate in tried
        for seed in settings.seeds_of_search
        for name, arm in arms.items()
        if rate in settings.rates_of(name)
    }


def choose_rates(
    settings: ComparisonSettings, arms: Iterable[str], records: Mapping[str, RunRecord]
) -> tuple[dict[str, float], Scores]:
    """Each arm's best rate, and all scores: the mean validation accuracy over the last fifth of the steps.

    A run that diverged scores 0; of equal rates the smaller wins.
    """
    scores = {
        name: {
            rate: [final_score(records[run_name("search", name, rate, seed)]) for seed in settings.seeds_of_search]
            for rate in sorted(settings.rates_of(name))
        }
        for name in arms
    }

    def best(found: Mapping[float, Sequence[float]]) -> float:
        return max(found, key=lambda rate: (sum(found[rate]), -rate))

    return {name: best(found) for name, found in scores.items()}, scores


def final_plan(settings: ComparisonSettings, arms: Arms, chosen: Iterable[tuple[str, float]]) -> dict[str, RunSettings]:
    """The pairs of arm and rate in `chosen`, with every seed; evaluated on the test images."""
    pairs = list(chosen)
    return {
        run_name("final", name, rate, seed): _at(arms[name], rate, seed, settings.steps)
        for seed in settings.final_seeds
        for name, rate in pairs
    }


def arm_records(
    settings: ComparisonSettings, records: Mapping[str, RunRecord], arm: str, rate: float
) -> list[RunRecord]:
    """The final runs of an arm at a rate, by seed."""
    return [records[run_name("final", arm, rate, seed)] for seed in settings.final_seeds]
