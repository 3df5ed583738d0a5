"""The mechanisms that a study's network is put together from, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from batchlab.lab.settings import SettingsError
from batchlab.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchwiseDropout,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    MeanOnlyBatchNorm1d,
    MeanOnlyBatchNorm2d,
    NoisyBatchNorm1d,
    NoisyBatchNorm2d,
    PopulationBatchNorm1d,
    PopulationBatchNorm2d,
    VarianceOnlyBatchNorm1d,
    VarianceOnlyBatchNorm2d,
    Whitening1d,
    Whitening2d,
)

__all__ = ["ACTIVATIONS", "DROPOUTS", "FACTORIZATIONS", "INITIAL_SLOPES", "NORMALIZATIONS", "choose"]

ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "silu": nn.SiLU,
}

INITIAL_SLOPES: Final[dict[str, float]] = {"relu": 0.0, "leaky_relu": 0.01, "prelu": 0.25, "silu": 0.0}
"""Slope of a rectifier for negative inputs, as He initialization counts it; 1 for what is none."""

Normalization = Callable[[int], nn.Module]


def _both(flat: type[nn.Module], spatial: type[nn.Module], **options: Any) -> tuple[Normalization, Normalization]:
    return partial(flat, **options), partial(spatial, **options)


NORMALIZATIONS: Final[dict[str, tuple[Normalization, Normalization] | None]] = {
    "none": None,
    "batch_norm": _both(BatchNorm1d, BatchNorm2d),
    "mean_only": _both(MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d),
    "variance_only": _both(VarianceOnlyBatchNorm1d, VarianceOnlyBatchNorm2d),
    "whitening": _both(Whitening1d, Whitening2d),
    "whitening_16": _both(Whitening1d, Whitening2d, group_size=16),
    "whitening_64": _both(Whitening1d, Whitening2d, group_size=64),
    "newton_64": _both(Whitening1d, Whitening2d, group_size=64, method="newton"),
    "ghost_batch_norm": _both(GhostBatchNorm1d, GhostBatchNorm2d, group_size=25),
    "population_batch_norm": _both(PopulationBatchNorm1d, PopulationBatchNorm2d, refresh_every=10),
    "population_running": _both(PopulationBatchNorm1d, PopulationBatchNorm2d, refresh_every=1, momentum=0.1),
    "noisy_batch_norm": _both(NoisyBatchNorm1d, NoisyBatchNorm2d),
}
"""From the number of channels, behind a linear layer and behind a convolution."""

DROPOUTS: Final[dict[str, Callable[[float, torch.Generator | None, bool], nn.Module] | None]] = {
    "none": None,
    "independent": lambda p, _, spatial: nn.Dropout2d(p) if spatial else nn.Dropout(p),
    "batchwise": lambda p, generator, _: BatchwiseDropout(p, generator=generator),
    "batchwise_bernoulli": lambda p, generator, _: BatchwiseDropout(p, exact=False, generator=generator),
}
"""From the share that is dropped, a generator for patterns (None: torch's), and whether to drop whole feature maps."""

FACTORIZATIONS: Final = (
    "none",
    "weight_norm",
    "centered_weight_norm",
    "weight_standardization",
    "spectral_norm",
    "natural",
)
"""How linear and convolution layers hold their weight."""


def choose(options: Mapping[str, Any], name: str, what: str) -> Any:
    """The option of that name.

    Raises:
        SettingsError: there is none; names the setting `what` and what is allowed.
    """
    if name not in options:
        raise SettingsError(f"{what} is {name!r}; allowed: {', '.join(map(repr, options))}")
    return options[name]
