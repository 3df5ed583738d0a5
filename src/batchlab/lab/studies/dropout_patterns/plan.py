"""Which runs the study dropout-patterns compares."""

from __future__ import annotations

from batchlab.lab.settings import DataSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies.dropout_patterns.settings import DropoutPatternsSettings, dropouts

__all__ = ["arms"]


def arms(settings: DropoutPatternsSettings) -> dict[str, RunSettings]:
    """Each arm's run, by the arm's name."""
    return {
        name: RunSettings(
            data=DataSettings(settings.dataset, binarize=False),
            network=NetworkSettings(settings.widths, "relu", weight_std=0.0, dropout=dropout),
            optimizer=OptimizerSettings(
                momentum=settings.momentum,
                nesterov=True,
                schedule="exponential",
                final=settings.final,
                algorithm="submatrix_sgd",
            ),
            batch_size=settings.batch_size,
            probe_units=0,
            evaluate_every=settings.evaluate_every,
        )
        for name, dropout in dropouts(settings).items()
    }
