"""Which runs the study bn-mnist needs: a search for each arm's learning rate, then the comparison."""

from __future__ import annotations

from collections.abc import Mapping

from batchlab.lab.records import RunRecord
from batchlab.lab.settings import DataSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies import search
from batchlab.lab.studies.bn_mnist.settings import Arm, BnMnistSettings
from batchlab.lab.studies.search import SEARCH_SEED, Scores, run_name

__all__ = ["SEARCH_SEED", "choose_rates", "final_plan", "run_name", "search_plan"]


def _run(settings: BnMnistSettings, arm: Arm, rate: float, seed: int, steps: int, validation: int) -> RunSettings:
    std = settings.well_scaled_std if arm.well_scaled else settings.weight_std
    return RunSettings(
        data=DataSettings(settings.dataset, binarize=True, validation=validation),
        network=NetworkSettings(settings.widths, "sigmoid", arm.normalization, std),
        optimizer=OptimizerSettings(rate, settings.momentum),
        steps=steps,
        batch_size=settings.batch_size,
        seed=seed,
        spacing=settings.spacing,
        probe_units=0 if validation else min(5, settings.widths[-1]),
    )


def search_plan(settings: BnMnistSettings, training_images: int) -> dict[str, RunSettings]:
    """Every arm at every rate, evaluated on a validation split of the training images; never on test images."""
    validation = round(training_images * settings.held_out_share)
    return {
        run_name("search", name, rate, seed): _run(settings, arm, rate, seed, settings.search_steps, validation)
        for rate in settings.rates
        for seed in range(SEARCH_SEED, SEARCH_SEED + settings.search_seeds)
        for name, arm in settings.arms.items()
    }


def choose_rates(settings: BnMnistSettings, records: Mapping[str, RunRecord]) -> tuple[dict[str, float], Scores]:
    """Each arm's best rate, and all scores of the search."""
    return search.choose_rates(settings.arms, settings.rates, settings.search_seeds, records)


def final_plan(settings: BnMnistSettings, chosen: Mapping[str, float]) -> dict[str, RunSettings]:
    """Every arm at its own best rate, and batch norm at the baseline's best rate; evaluated on the test images."""
    pairs = [(name, rate) for name, rate in chosen.items()]
    if chosen["batch_norm"] != chosen["none"]:
        pairs.append(("batch_norm", chosen["none"]))
    return {
        run_name("final", name, rate, seed): _run(settings, settings.arms[name], rate, seed, settings.steps, 0)
        for seed in range(settings.seeds)
        for name, rate in pairs
    }
