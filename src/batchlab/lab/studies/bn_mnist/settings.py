"""Settings of the study bn-mnist, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from batchlab.lab.settings import SettingsError
from batchlab.lab.studies.settings import ComparisonSettings

__all__ = ["ARMS", "SIZES", "Arm", "BnMnistSettings"]


@dataclass(frozen=True)
class Arm:
    """One way to build the network.

    Args:
        label: in figures and tables.
        normalization: name of the mechanism.
        well_scaled: start with `well_scaled_std` instead of `weight_std`.
    """

    label: str
    normalization: str
    well_scaled: bool = False


ARMS: Final[dict[str, Arm]] = {
    "none": Arm("without batch norm", "none"),
    "batch_norm": Arm("with batch norm", "batch_norm"),
    "none_well_scaled": Arm("without, well-scaled start", "none", well_scaled=True),
    "batch_norm_well_scaled": Arm("with, well-scaled start", "batch_norm", well_scaled=True),
}

_TARGETS: Final = {"mnist": (0.90, 0.95, 0.97), "fashion": (0.80, 0.85, 0.88)}


@dataclass(frozen=True)
class BnMnistSettings(ComparisonSettings):
    """Ioffe & Szegedy 2015, section 4.1; what the paper does not state is chosen here, and said in the report.

    Args:
        steps: of each final run; the paper has 50,000.
        batch_size: the paper has 60.
        widths: the paper has three layers of 100.
        weight_std: of the "small random Gaussian values" the weights start from.
        well_scaled_std: the start of the control arms, near 1/√(units); 0 leaves these arms out.
        momentum: of the gradient descent.
        spacing: how far apart evaluations are, as a share of the steps done.
        targets: accuracies to reach; empty: 90, 95 and 97 % (80, 85 and 88 % for fashion).
    """

    steps: int = 50_000
    seeds: int = 5
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    search_steps: int = 25_000
    search_seeds: int = 2
    batch_size: int = 60
    widths: tuple[int, ...] = (100, 100, 100)
    weight_std: float = 0.01
    well_scaled_std: float = 0.1
    momentum: float = 0.9
    spacing: float = 0.05
    targets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            object.__setattr__(self, "targets", _TARGETS.get(self.dataset, ()))
        if any(not 0 < target <= 1 for target in self.targets):
            raise SettingsError(f"targets is {self.targets}; accuracies are between 0 and 1")

    @property
    def arms(self) -> dict[str, Arm]:
        """The arms that this study runs."""
        return {name: arm for name, arm in ARMS.items() if not arm.well_scaled or self.well_scaled_std > 0}


SIZES: Final[dict[str, BnMnistSettings]] = {
    "full": BnMnistSettings(),
    "demo": BnMnistSettings(
        steps=10_000,
        seeds=3,
        rates=(0.03, 0.1, 0.3, 1.0, 3.0),
        search_steps=4_000,
        search_seeds=1,
        well_scaled_std=0.0,
    ),
    "quick": BnMnistSettings(
        steps=1_500,
        seeds=3,
        rates=(0.1, 0.3, 1.0),
        search_steps=800,
        search_seeds=1,
        well_scaled_std=0.0,
        spacing=0.2,
    ),
}
