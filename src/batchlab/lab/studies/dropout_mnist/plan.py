"""Which runs the study dropout-mnist needs: a search for each arm's learning rate, then the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batchlab.lab.comparison import final_score
from batchlab.lab.records import RunRecord
from batchlab.lab.settings import DataSettings, DropoutSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies.dropout_mnist.settings import ARMS, DropoutMnistSettings

__all__ = ["SEARCH_SEED", "choose_rates", "final_plan", "run_name", "search_plan"]

SEARCH_SEED = 1000  # the search's seeds start here, so that no final run was chosen by its own luck


def run_name(stage: str, arm: str, rate: float, seed: int) -> str:
    """The folder of a run, under the study's."""
    return f"runs/{stage}/{arm}-rate{rate:g}-seed{seed}"


def _run(settings: DropoutMnistSettings, name: str, rate: float, seed: int, steps: int, validation: int) -> RunSettings:
    arm = ARMS[name]
    dropout = DropoutSettings(arm.dropout, settings.input_dropout, settings.hidden_dropout)
    widths = settings.small_widths if arm.small else settings.widths
    return RunSettings(
        data=DataSettings(settings.dataset, binarize=False, validation=validation),
        network=NetworkSettings(widths, "relu", weight_std=0.0, dropout=dropout),
        optimizer=OptimizerSettings(
            rate, settings.momentum, nesterov=True, schedule="exponential", final=settings.final, algorithm=arm.algorithm
        ),
        steps=steps,
        batch_size=settings.batch_size,
        seed=seed,
        probe_units=0,
        evaluate_every=settings.evaluate_every,
        training_errors=arm.small,  # on the large networks this would take longer than training
    )


def search_plan(settings: DropoutMnistSettings, training_images: int) -> dict[str, RunSettings]:
    """Every arm at every rate, evaluated on a validation split of the training images; never on test images."""
    validation = round(training_images * settings.held_out_share)
    return {
        run_name("search", name, rate, seed): _run(settings, name, rate, seed, settings.search_steps, validation)
        for rate in settings.rates
        for seed in range(SEARCH_SEED, SEARCH_SEED + settings.search_seeds)
        for name in ARMS
    }


def choose_rates(
    settings: DropoutMnistSettings, records: Mapping[str, RunRecord]
) -> tuple[dict[str, float], dict[str, dict[float, list[float]]]]:
    """Each arm's best rate, and all scores: the mean validation accuracy over the last fifth of the steps.

    A run that diverged scores 0; of equal rates the smaller wins.
    """
    seeds = range(SEARCH_SEED, SEARCH_SEED + settings.search_seeds)
    scores = {
        name: {
            rate: [final_score(records[run_name("search", name, rate, seed)]) for seed in seeds]
            for rate in sorted(settings.rates)
        }
        for name in ARMS
    }

    def best(rates: Mapping[float, Sequence[float]]) -> float:
        return max(rates, key=lambda rate: (sum(rates[rate]), -rate))

    return {name: best(rates) for name, rates in scores.items()}, scores


def final_plan(settings: DropoutMnistSettings, chosen: Mapping[str, float]) -> dict[str, RunSettings]:
    """Every arm at its own best rate; evaluated on the test images."""
    return {
        run_name("final", name, rate, seed): _run(settings, name, rate, seed, settings.steps, 0)
        for seed in range(settings.seeds)
        for name, rate in chosen.items()
    }
