"""Which runs the study dropout-mnist compares."""

from __future__ import annotations

from batchlab.lab.settings import DataSettings, DropoutSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies.dropout_mnist.settings import ARMS, Arm, DropoutMnistSettings

__all__ = ["arms"]


def _run(settings: DropoutMnistSettings, arm: Arm) -> RunSettings:
    dropout = DropoutSettings(arm.dropout, settings.input_dropout, settings.hidden_dropout)
    widths = settings.small_widths if arm.small else settings.widths
    return RunSettings(
        data=DataSettings(settings.dataset, binarize=False),
        network=NetworkSettings(widths, "relu", weight_std=0.0, dropout=dropout),
        optimizer=OptimizerSettings(
            momentum=settings.momentum,
            nesterov=True,
            schedule="exponential",
            final=settings.final,
            algorithm=arm.algorithm,
        ),
        batch_size=settings.batch_size,
        probe_units=0,
        evaluate_every=settings.evaluate_every,
        training_errors=arm.small,  # on the large networks this would take longer than training
    )


def arms(settings: DropoutMnistSettings) -> dict[str, RunSettings]:
    """Each arm's run, by the arm's name."""
    return {name: _run(settings, arm) for name, arm in ARMS.items()}
