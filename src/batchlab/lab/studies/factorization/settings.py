"""Settings of the study factorization, its arms and its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from batchlab.lab.settings import SettingsError
from batchlab.lab.studies.settings import ComparisonSettings

__all__ = ["ARMS", "BASELINE", "LABELS", "REFERENCE", "SIZES", "STARTS", "Arm", "FactorizationSettings", "full_name"]

STARTS: Final[dict[str, str]] = {"he": "He's start", "small": "a small start"}
"""First weights -> what figures and tables call them."""

BASELINE: Final = "plain"
REFERENCE: Final = "batch_norm"


@dataclass(frozen=True)
class Arm:
    """One way to hold or to change the weights.

    Args:
        label: what figures and tables call it.
        looks_at: what its factors or steps depend on, while it trains: "weights" alone, or statistics of activations in
            "earlier batches" or in "each batch".
        network: fields of `NetworkSettings`.
        algorithm: of the optimizer.
        rate_scales: start -> what the study's rates are multiplied by, where they have another scale.
    """

    label: str
    looks_at: str
    network: Mapping[str, Any] = field(default_factory=dict)
    algorithm: str = "sgd"
    rate_scales: Mapping[str, float] = field(default_factory=dict)


def _factored(name: str, **also: Any) -> dict[str, Any]:
    return {"factorization": name, "data_start": True, **also}


_WEIGHTS, _EARLIER, _BATCH = "weights", "earlier batches", "each batch"

ARMS: Final[dict[str, Arm]] = {
    BASELINE: Arm("plain", _WEIGHTS),
    REFERENCE: Arm("batch norm", _BATCH, {"normalization": "batch_norm"}),
    "weight_norm": Arm("weight norm", _WEIGHTS, _factored("weight_norm")),
    "centered": Arm("centered weight norm", _WEIGHTS, _factored("centered_weight_norm")),
    "standardized": Arm("weight standardization", _WEIGHTS, _factored("weight_standardization")),
    "path_sgd": Arm("Path-SGD", _WEIGHTS, algorithm="path_sgd", rate_scales={"he": 1.0, "small": 0.001}),
    "natural": Arm("natural (PRONG)", _EARLIER, {"factorization": "natural"}, rate_scales={"he": 0.1, "small": 0.1}),
    "population": Arm("population BN (held)", _EARLIER, {"normalization": "population_batch_norm"}),
    "running": Arm("population BN (running)", _EARLIER, {"normalization": "population_running"}),
    "mean_only": Arm("weight norm + mean-only BN", _BATCH, _factored("weight_norm", normalization="mean_only")),
    "ghost": Arm("ghost batch norm", _BATCH, {"normalization": "ghost_batch_norm"}),
}
"""Of each start; the baseline first, then what it is to be compared with."""

LABELS: Final[dict[str, str]] = {name: arm.label for name, arm in ARMS.items()}

_TARGETS: Final = {"mnist": (0.90, 0.95, 0.96, 0.97), "fashion": (0.80, 0.83, 0.85, 0.86)}


def full_name(arm: str, start: str) -> str:
    """The name of an arm's runs from a start."""
    return f"{arm}-{start}"


@dataclass(frozen=True)
class FactorizationSettings(ComparisonSettings):
    """How much of batch norm's gain each factorization of Wu + b keeps (papers §4, §1), in a deep ReLU network.

    Args:
        rates: for most arms; those of Path-SGD and of natural coordinates are multiplied by `Arm.rate_scales`.
        search_seeds: with one, luck decides between two rates of the plain network, and with it how far batch norm is
            ahead of it (experiments/factorization, what it does not show).
        widths: of the hidden layers; a ReLU network, because Path-SGD knows no other.
        starts: "he" and "small", the first weights.
        small_std: standard deviation of the first weights of the small start; He's is √(2/units), 0.14 for 100.
        momentum: of every arm.
        refresh_every: steps between two refreshes of natural coordinates, which cost as much as hundreds of steps.
        natural_eps: added to the covariance that natural layers whiten by.
        spacing: how far apart evaluations are, as a share of the steps done.
        targets: accuracies to reach; empty: 90, 95, 96 and 97 % (80, 83, 85 and 86 % for fashion).
    """

    steps: int = 2_000
    seeds: int = 5
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    search_steps: int = 500
    search_seeds: int = 3
    widths: tuple[int, ...] = (100, 100, 100, 100, 100)
    starts: tuple[str, ...] = ("he", "small")
    small_std: float = 0.05
    momentum: float = 0.9
    refresh_every: int = 100
    natural_eps: float = 1e-3
    spacing: float = 0.08
    targets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.starts or len(set(self.starts)) != len(self.starts) or not set(self.starts) <= set(STARTS):
            raise SettingsError(f"starts is {self.starts}; it must name one or more of {', '.join(STARTS)}, once each")
        if not self.small_std > 0:
            raise SettingsError(f"small_std is {self.small_std}; it must be above 0")
        if not self.targets:
            object.__setattr__(self, "targets", _TARGETS.get(self.dataset, ()))
        if not self.targets or any(not 0 < target <= 1 for target in self.targets):
            raise SettingsError(f"targets is {self.targets}; it must name accuracies between 0 and 1")

    def rates_of(self, arm: str) -> tuple[float, ...]:
        """The rates tried for an arm, by its name with the start's."""
        name, _, start = arm.rpartition("-")
        scale = ARMS[name].rate_scales.get(start, 1.0)
        return tuple(float(f"{rate * scale:.6g}") for rate in self.rates)


SIZES: Final[dict[str, FactorizationSettings]] = {
    "full": FactorizationSettings(),
    "demo": FactorizationSettings(
        steps=600, seeds=3, rates=(0.003, 0.01, 0.03, 0.1), search_steps=200, search_seeds=1, spacing=0.1
    ),
    "quick": FactorizationSettings(
        steps=200,
        seeds=2,
        rates=(0.03,),
        search_steps=40,
        search_seeds=1,
        widths=(100, 100, 100),
        starts=("he",),
        spacing=0.2,
    ),
}
