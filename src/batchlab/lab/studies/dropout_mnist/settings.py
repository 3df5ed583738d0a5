"""Settings of the study dropout-mnist, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from batchlab.lab.settings import SettingsError
from batchlab.lab.studies.settings import ComparisonSettings

__all__ = ["ARMS", "SIZES", "Arm", "DropoutMnistSettings"]


@dataclass(frozen=True)
class Arm:
    """One way to build and train the network.

    Args:
        label: in figures and tables.
        dropout: name of the mechanism.
        algorithm: of the optimizer.
        small: with the small network's widths.
    """

    label: str
    dropout: str
    algorithm: str = "sgd"
    small: bool = False


ARMS: Final[dict[str, Arm]] = {
    "small": Arm("small, no dropout", "none", small=True),
    "none": Arm("large, no dropout", "none"),
    "independent": Arm("large, independent dropout", "independent"),
    "batchwise": Arm("large, batchwise dropout", "batchwise", "submatrix_sgd"),
}

_TARGETS: Final = {"mnist": (0.020, 0.015, 0.013, 0.012), "fashion": (0.13, 0.12, 0.11, 0.10)}


@dataclass(frozen=True)
class DropoutMnistSettings(ComparisonSettings):
    """Graham, Reizenstein & Robinson 2015, section 1, with the hyperparameters of the authors' code where it has them.

    Args:
        steps: of each final run; the authors' code has 200 epochs of 600.
        rates: first learning rates tried for each arm. The authors' code has what is 0.1 here without dropout,
            and 0.025 behind a dropout of one half: the inverted scaling enlarges activations, and gradients with them.
        batch_size: the authors' code has 100.
        widths: of the large network.
        small_widths: of the small one.
        input_dropout: share of the pixels that is dropped.
        hidden_dropout: share of the hidden units that is dropped.
        momentum: Nesterov's.
        final: last learning rate as a share of the first, reached exponentially; exp(-2) as in the authors' 200 epochs.
        evaluate_every: steps between evaluations.
        targets: test errors to reach; empty: 2, 1.5, 1.3 and 1.2 % (13, 12, 11 and 10 % for fashion).
    """

    steps: int = 60_000
    search_steps: int = 9_000
    widths: tuple[int, ...] = (800, 800)
    small_widths: tuple[int, ...] = (80, 80)
    input_dropout: float = 0.2
    hidden_dropout: float = 0.5
    momentum: float = 0.9
    final: float = 0.135
    evaluate_every: int = 600
    targets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate_every < 1:
            raise SettingsError(f"evaluate_every is {self.evaluate_every}; it must be 1 or more")
        if not self.targets:
            object.__setattr__(self, "targets", _TARGETS.get(self.dataset, ()))
        if any(not 0 < target < 1 for target in self.targets):
            raise SettingsError(f"targets is {self.targets}; errors are shares between 0 and 1")


SIZES: Final[dict[str, DropoutMnistSettings]] = {
    "full": DropoutMnistSettings(),
    "demo": DropoutMnistSettings(steps=6_000, seeds=3, rates=(0.1, 0.3), search_steps=1_800, evaluate_every=300),
    "quick": DropoutMnistSettings(
        steps=400, seeds=3, rates=(0.1,), search_steps=40, widths=(400, 400), small_widths=(40, 40), evaluate_every=40
    ),
}
