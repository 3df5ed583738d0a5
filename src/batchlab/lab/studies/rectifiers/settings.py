"""Settings of the study rectifiers, its sizes and its networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from batchlab.lab.settings import SettingsError
from batchlab.lab.studies.settings import ComparisonSettings

__all__ = ["NORMALIZATIONS", "SIZES", "STARTS", "RectifiersSettings", "Start", "cell"]

NORMALIZATIONS: Final[dict[str, str]] = {"none": "without batch norm", "batch_norm": "with batch norm"}
"""Name of the normalization -> what tables call it."""


@dataclass(frozen=True)
class Start:
    """A nonlinearity and the first weights.

    Args:
        label: what figures and tables call it.
        activation: name of the nonlinearity.
        initialization: "xavier" or "he".
        factor: what a layer multiplies the mean square by at the start, in a network of infinite width; 0: not known
            in closed form.
    """

    label: str
    activation: str
    initialization: str
    factor: float


STARTS: Final[dict[str, Start]] = {
    # To a sigmoid He's formula gives what Xavier's gives: it is no rectifier, so one arm stands for both.
    "sigmoid": Start("sigmoid", "sigmoid", "xavier", 0.0),
    "relu_xavier": Start("ReLU, Xavier's start", "relu", "xavier", 1 / 2),
    "relu_he": Start("ReLU, He's start", "relu", "he", 1.0),
    "prelu_xavier": Start("PReLU, Xavier's start", "prelu", "xavier", (1 + 0.25**2) / 2),
    "prelu_he": Start("PReLU, He's start", "prelu", "he", 1.0),
}


def cell(start: str, depth: int, normalization: str = "none") -> str:
    """The name of a network: one arm of the study."""
    return f"{start}-{depth}-{normalization}"


_TARGETS: Final = {"mnist": 0.90, "fashion": 0.80}


@dataclass(frozen=True)
class RectifiersSettings(ComparisonSettings):
    """What rectifiers and their first weights add (papers §3), and whether batch norm makes them unnecessary.

    Args:
        search_seeds: with two, luck chose a rate at which half of the runs of a network diverge.
        depths: numbers of hidden layers, the smallest first.
        width: units of each.
        trains_from: accuracy at the end from which a run counts as trained.
        momentum: of the gradient descent.
        final: the last learning rate as a share of the first; in between it falls linearly.
        spacing: how far apart evaluations are, as a share of the steps done.
    """

    steps: int = 1_800
    seeds: int = 5
    rates: tuple[float, ...] = (0.002, 0.008, 0.03, 0.12, 0.5, 2.0, 8.0)
    search_steps: int = 400
    search_seeds: int = 3
    depths: tuple[int, ...] = (3, 10, 22, 30)
    width: int = 64
    trains_from: float = 0.5
    momentum: float = 0.9
    final: float = 0.01
    spacing: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths or min(self.depths) < 1 or list(self.depths) != sorted(set(self.depths)):
            raise SettingsError(f"depths is {self.depths}; it must name different numbers of layers, smallest first")
        if not 0.1 < self.trains_from < 1:
            raise SettingsError(
                f"trains_from is {self.trains_from}; it must be above 0.1, which guessing gets, and below 1"
            )

    @property
    def target(self) -> float:
        """The accuracy that steps are counted to: 90 %, for fashion 80 %."""
        return _TARGETS.get(self.dataset, 0.9)

    @property
    def cells(self) -> tuple[str, ...]:
        """All networks."""
        return tuple(cell(start, depth, norm) for norm in NORMALIZATIONS for start in STARTS for depth in self.depths)


SIZES: Final[dict[str, RectifiersSettings]] = {
    "full": RectifiersSettings(),
    "demo": RectifiersSettings(
        steps=1_000, seeds=3, rates=(0.004, 0.03, 0.12, 0.5), search_steps=300, search_seeds=1, depths=(3, 22)
    ),
    "quick": RectifiersSettings(
        steps=150, seeds=2, rates=(0.01, 0.1), search_steps=40, search_seeds=1, depths=(2, 16), width=32, spacing=0.5
    ),
}
