"""Settings of the study learning-rates, its arms, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from batchlab.lab.settings import SettingsError
from batchlab.lab.studies.settings import ComparisonSettings

__all__ = ["ACTIVATIONS", "BASELINE", "MECHANISMS", "SCALE_FREE", "SIZES", "LearningRatesSettings", "arm", "label"]

BASELINE: Final = "none"

MECHANISMS: Final[dict[str, tuple[str, str, str]]] = {
    "none": ("none", "none", "none"),
    "mean_only": ("centering", "mean_only", "none"),
    "variance_only": ("rescaling", "variance_only", "none"),
    "batch_norm": ("batch norm", "batch_norm", "none"),
    "ghost": ("ghost batch norm", "ghost_batch_norm", "none"),
    "population": ("population batch norm", "population_batch_norm", "none"),
    "whitening": ("whitening", "whitening_16", "none"),
    "weight_norm": ("weight norm", "none", "weight_norm"),
    "centered": ("weight norm + centering", "mean_only", "weight_norm"),
    "standardization": ("weight standardization", "none", "weight_standardization"),
}
"""Mechanism -> what figures and tables call it, its normalization, and how it holds weights."""

ACTIVATIONS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "relu": ("ReLU", tuple(MECHANISMS)),
    "sigmoid": ("sigmoid", ("none", "mean_only", "variance_only", "batch_norm", "weight_norm", "centered")),
}
"""Nonlinearity -> what texts call it, and the mechanisms that are tried with it."""

SCALE_FREE: Final = frozenset(MECHANISMS) - {"none", "mean_only", "population"}
"""Mechanisms with which the length of a hidden layer's weight (or of v, its direction) does not change the output."""


def arm(activation: str, mechanism: str) -> str:
    """The name of an arm."""
    return f"{activation}_{mechanism}"


def label(name: str) -> str:
    """A mechanism in words, from the name of an arm."""
    return MECHANISMS[name.split("_", 1)[1]][0]


@dataclass(frozen=True)
class LearningRatesSettings(ComparisonSettings):
    """How large a learning rate a network stands (Ioffe & Szegedy 2015, sections 3.3 and 4.2).

    Here the search is the study: it says with which rates each arm trains. The final runs, with other seeds and on the
    test images, say how well each arm does at its best rate.

    Args:
        steps: of each final run; as many as in the search.
        search_seeds: runs of each arm and rate.
        widths: of the hidden layers, multiples of 16 for the groups of whitening.
        weight_std: of the first weights of the sigmoid network, near 1/√(units); the ReLU network starts as He's.
        momentum: of the gradient descent.
        evaluate_every: steps between evaluations.
        target: accuracy on held-out images, mean over the last fifth of the steps, with which a run counts as trained;
            0: 90 % (80 % for fashion).
        activations: nonlinearities, each with a comparison of its own.
    """

    steps: int = 500
    seeds: int = 5
    rates: tuple[float, ...] = (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    search_steps: int = 500
    search_seeds: int = 5
    batch_size: int = 100
    widths: tuple[int, ...] = (128, 128, 128)
    weight_std: float = 0.1
    momentum: float = 0.9
    evaluate_every: int = 100
    target: float = 0.0
    activations: tuple[str, ...] = ("relu", "sigmoid")

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width % 16 for width in self.widths):
            raise SettingsError(f"widths is {self.widths}; each must be a multiple of 16, for groups of 16")
        if self.batch_size % 25:
            raise SettingsError(f"batch_size is {self.batch_size}; it must be a multiple of 25, for ghost batches")
        if not 0 <= self.target <= 1:
            raise SettingsError(f"target is {self.target}; it must be an accuracy from 0 (by the data set) to 1")
        unknown = [name for name in self.activations if name not in ACTIVATIONS]
        if unknown or not self.activations or len(set(self.activations)) != len(self.activations):
            raise SettingsError(f"activations is {self.activations}; allowed, once each: {', '.join(ACTIVATIONS)}")

    @property
    def goal(self) -> float:
        """The accuracy with which a run counts as trained."""
        return self.target or {"fashion": 0.8}.get(self.dataset, 0.9)

    def arms(self, activation: str) -> list[str]:
        """The names of the arms with a nonlinearity; the first is the baseline."""
        return [arm(activation, mechanism) for mechanism in ACTIVATIONS[activation][1]]


SIZES: Final[dict[str, LearningRatesSettings]] = {
    "full": LearningRatesSettings(),
    "demo": LearningRatesSettings(
        steps=300,
        seeds=3,
        rates=(0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0),
        search_steps=300,
        evaluate_every=50,
        search_seeds=2,
        activations=("relu",),
    ),
    "quick": LearningRatesSettings(
        steps=60,
        seeds=2,
        rates=(0.01, 0.1, 1.0, 10.0),
        search_steps=60,
        search_seeds=2,
        widths=(64, 64),
        evaluate_every=20,
        target=0.6,
        activations=("relu",),
    ),
}
