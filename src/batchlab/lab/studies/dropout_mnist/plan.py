"""Which runs the study dropout-mnist needs: a search for each arm's learning rate, then the comparison."""

from __future__ import annotations

from collections.abc import Mapping

from batchlab.lab.records import RunRecord
from batchlab.lab.settings import DataSettings, DropoutSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies import search
from batchlab.lab.studies.dropout_mnist.settings import ARMS, DropoutMnistSettings
from batchlab.lab.studies.search import SEARCH_SEED, Scores, run_name

__all__ = ["SEARCH_SEED", "choose_rates", "final_plan", "run_name", "search_plan"]


def _run(settings: DropoutMnistSettings, name: str, rate: float, seed: int, steps: int, validation: int) -> RunSettings:
    arm = ARMS[name]
    dropout = DropoutSettings(arm.dropout, settings.input_dropout, settings.hidden_dropout)
    widths = settings.small_widths if arm.small else settings.widths
    return RunSettings(
        data=DataSettings(settings.dataset, binarize=False, validation=validation),
        network=NetworkSettings(widths, "relu", weight_std=0.0, dropout=dropout),
        optimizer=OptimizerSettings(
            rate,
            settings.momentum,
            nesterov=True,
            schedule="exponential",
            final=settings.final,
            algorithm=arm.algorithm,
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


def choose_rates(settings: DropoutMnistSettings, records: Mapping[str, RunRecord]) -> tuple[dict[str, float], Scores]:
    """Each arm's best rate, and all scores of the search."""
    return search.choose_rates(ARMS, settings.rates, settings.search_seeds, records)


def final_plan(settings: DropoutMnistSettings, chosen: Mapping[str, float]) -> dict[str, RunSettings]:
    """Every arm at its own best rate; evaluated on the test images."""
    return {
        run_name("final", name, rate, seed): _run(settings, name, rate, seed, settings.steps, 0)
        for seed in range(settings.seeds)
        for name, rate in chosen.items()
    }
