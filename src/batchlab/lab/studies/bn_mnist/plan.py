"""Which runs the study bn-mnist compares."""

from __future__ import annotations

from collections.abc import Mapping

from batchlab.lab.settings import DataSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies.bn_mnist.settings import Arm, BnMnistSettings

__all__ = ["arms", "final_pairs"]


def _run(settings: BnMnistSettings, arm: Arm) -> RunSettings:
    std = settings.well_scaled_std if arm.well_scaled else settings.weight_std
    return RunSettings(
        data=DataSettings(settings.dataset, binarize=True),
        network=NetworkSettings(settings.widths, "sigmoid", arm.normalization, std),
        optimizer=OptimizerSettings(momentum=settings.momentum),
        batch_size=settings.batch_size,
        spacing=settings.spacing,
        probe_units=min(5, settings.widths[-1]),
    )


def arms(settings: BnMnistSettings) -> dict[str, RunSettings]:
    """Each arm's run, by the arm's name."""
    return {name: _run(settings, arm) for name, arm in settings.arms.items()}


def final_pairs(chosen: Mapping[str, float]) -> list[tuple[str, float]]:
    """Every arm at its own best rate, and batch norm at the baseline's best rate."""
    pairs = list(chosen.items())
    if chosen["batch_norm"] != chosen["none"]:
        pairs.append(("batch_norm", chosen["none"]))
    return pairs
