"""Settings of the study whitening, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from batchlab.lab.settings import SettingsError
from batchlab.lab.studies.settings import ComparisonSettings

__all__ = ["ARMS", "SIZES", "WhiteningSettings"]

ARMS: Final[dict[str, str]] = {
    "none": "none",
    "mean_only": "centering",
    "variance_only": "rescaling",
    "batch_norm": "batch norm",
    "whitening_16": "whitening, groups of 16",
    "whitening_64": "whitening, groups of 64",
    "newton_64": "Newton, groups of 64",
    "whitening": "whitening, all channels",
}
"""Name of the normalization -> what figures and tables call it."""

_TARGETS: Final = {"mnist": (0.90, 0.95, 0.97), "fashion": (0.80, 0.85, 0.87)}


@dataclass(frozen=True)
class WhiteningSettings(ComparisonSettings):
    """What centering, rescaling and whitening each contribute (papers §1, §4.2), on the network of Ioffe & Szegedy.

    Args:
        batch_size: several times as many samples as a group has channels, or whitening is noise.
        widths: a multiple of 64, for the groups.
        weight_std: of the first weights, near 1/√(units).
        momentum: of the gradient descent.
        spacing: how far apart evaluations are, as a share of the steps done.
        targets: accuracies to reach; empty: 90, 95 and 97 % (80, 85 and 87 % for fashion).
    """

    steps: int = 5_000
    seeds: int = 5
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    search_steps: int = 2_000
    batch_size: int = 256
    widths: tuple[int, ...] = (128, 128, 128)
    weight_std: float = 0.1
    momentum: float = 0.9
    spacing: float = 0.05
    targets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width % 64 for width in self.widths):
            raise SettingsError(f"widths is {self.widths}; each must be a multiple of 64, for groups of 16 and 64")
        if not self.targets:
            object.__setattr__(self, "targets", _TARGETS.get(self.dataset, ()))
        if not self.targets or any(not 0 < target <= 1 for target in self.targets):
            raise SettingsError(f"targets is {self.targets}; it must name accuracies between 0 and 1")


SIZES: Final[dict[str, WhiteningSettings]] = {
    "full": WhiteningSettings(),
    "demo": WhiteningSettings(steps=1_500, seeds=3, rates=(0.1, 0.3, 1.0), search_steps=600, widths=(64, 64, 64)),
    "quick": WhiteningSettings(
        steps=300, seeds=2, rates=(0.3,), search_steps=60, widths=(64, 64), batch_size=128, spacing=0.2
    ),
}
