"""Settings of the study why, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from batchlab.lab.settings import SettingsError
from batchlab.lab.studies.settings import ComparisonSettings

__all__ = ["ARMS", "NETWORKS", "NORMALIZATIONS", "SIZES", "WhySettings", "arm_of"]

NETWORKS: Final[dict[str, str]] = {"sigmoid": "sigmoid network", "relu": "ReLU network"}
"""Activation -> what figures and tables call the network."""

NORMALIZATIONS: Final[dict[str, str]] = {
    "none": "none",
    "batch_norm": "batch norm",
    "noisy_batch_norm": "noisy batch norm",
}
"""Name of the normalization -> what figures and tables call it."""


def arm_of(network: str, normalization: str) -> str:
    """The name of an arm.

    >>> arm_of("relu", "batch_norm")
    'relu-batch_norm'
    """
    return f"{network}-{normalization}"


ARMS: Final[dict[str, str]] = {
    arm_of(network, normalization): f"{network if network == 'sigmoid' else 'ReLU'}, {label}"
    for network in NETWORKS
    for normalization, label in NORMALIZATIONS.items()
}
"""Name of the arm -> what figures and tables call it."""

_TARGETS: Final = {"mnist": (0.90, 0.95, 0.97), "fashion": (0.80, 0.84, 0.86)}


@dataclass(frozen=True)
class WhySettings(ComparisonSettings):
    """Whether batch norm reduces internal covariate shift, and what else it changes (papers §5.2, §1).

    Args:
        widths: of the sigmoid network, whose first weights are Gaussian.
        relu_widths: of the ReLU network, which starts as He et al. (2015) say.
        weight_std: of the sigmoid network's first weights.
        momentum: of the gradient descent.
        spacing: how far apart measurements are, as a share of the steps done.
        losses: highest and lowest training loss between which arms are compared at the same progress.
        targets: accuracies to reach; empty: 90, 95 and 97 % (80, 84 and 86 % for fashion).
    """

    steps: int = 5_000
    seeds: int = 5
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    search_steps: int = 1_500
    search_seeds: int = 1
    widths: tuple[int, ...] = (100, 100, 100)
    relu_widths: tuple[int, ...] = (100, 100, 100, 100)
    weight_std: float = 0.1
    momentum: float = 0.9
    spacing: float = 0.05
    losses: tuple[float, float] = (0.5, 0.1)
    targets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        high, low = self.losses
        if not high > low > 0:
            raise SettingsError(f"losses is {self.losses}; it must be a higher and a lower training loss, above 0")
        if not self.targets:
            object.__setattr__(self, "targets", _TARGETS.get(self.dataset, ()))
        if not self.targets or any(not 0 < target <= 1 for target in self.targets):
            raise SettingsError(f"targets is {self.targets}; it must name accuracies between 0 and 1")


SIZES: Final[dict[str, WhySettings]] = {
    "full": WhySettings(),
    "demo": WhySettings(steps=1_500, seeds=3, rates=(0.03, 0.1, 0.3, 1.0), search_steps=500),
    "quick": WhySettings(steps=250, seeds=2, rates=(0.1, 0.3), search_steps=60, spacing=0.2),
}
