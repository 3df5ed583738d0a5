"""The networks of the studies, with every mechanism chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from batchlab.lab.settings import NetworkSettings, SettingsError
from batchlab.nn import (
    BatchNorm1d,
    BatchwiseDropout,
    MeanOnlyBatchNorm1d,
    SubmatrixSequential,
    VarianceOnlyBatchNorm1d,
    Whitening1d,
)

__all__ = ["ACTIVATIONS", "DROPOUTS", "MLP", "NORMALIZATIONS"]

ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
}

NORMALIZATIONS: Final[dict[str, Callable[[int], nn.Module] | None]] = {
    "none": None,
    "batch_norm": BatchNorm1d,
    "mean_only": MeanOnlyBatchNorm1d,
    "variance_only": VarianceOnlyBatchNorm1d,
    "whitening": Whitening1d,
    "whitening_16": partial(Whitening1d, group_size=16),
    "whitening_64": partial(Whitening1d, group_size=64),
    "newton_64": partial(Whitening1d, group_size=64, method="newton"),
}

DROPOUTS: Final[dict[str, Callable[[float, torch.Generator | None], nn.Module] | None]] = {
    "none": None,
    "independent": lambda p, _: nn.Dropout(p),
    "batchwise": lambda p, generator: BatchwiseDropout(p, generator=generator),
    "batchwise_bernoulli": lambda p, generator: BatchwiseDropout(p, exact=False, generator=generator),
}
"""From the share that is dropped, and a generator for patterns (None: torch's)."""


def _choose(options: dict[str, Callable[..., nn.Module]], name: str, what: str) -> Callable[..., nn.Module]:
    if name not in options:
        raise SettingsError(f"{what} is {name!r}; allowed: {', '.join(map(repr, options))}")
    return options[name]


def _linear(in_features: int, out_features: int, bias: bool) -> nn.Module:
    # Linear's own initialization would draw random numbers for a bias too, and arms with and without one would part.
    layer: nn.Module = skip_init(nn.Linear, in_features, out_features, bias=bias)
    return layer


def _normalization(kind: Callable[..., nn.Module], width: int) -> nn.Module:
    try:
        return kind(width)
    except ValueError as error:
        raise SettingsError(f"network.widths has {width}, which the normalization refuses: {error}") from error


class MLP(SubmatrixSequential):
    """A multilayer perceptron: Linear, normalization, activation, dropout for each hidden layer, and a last Linear.

    Weights start as Gaussians of standard deviation `weight_std`, biases at zero (or uniform, see the settings). A
    hidden Linear before a normalization has no bias: mean subtraction would cancel it (Ioffe & Szegedy 2015, section
    3.2). The same torch seed gives the same weights whatever the normalization and the dropout. Batchwise dropout
    computes kept units alone.

    Shapes:
        input: (N, ...) with `in_features` numbers a sample, flattened; output: (N, out_features).

    Args:
        in_features: numbers in a sample.
        out_features: classes.
        settings: widths, mechanisms and initialization.

    >>> MLP(784, 10, NetworkSettings(widths=(100,), normalization="batch_norm"))
    MLP(
      (flatten): Flatten(start_dim=1, end_dim=-1)
      (linear1): Linear(in_features=784, out_features=100, bias=False)
      (normalization1): BatchNorm1d(100, eps=1e-05, ...)
      (activation1): Sigmoid()
      (output): Linear(in_features=100, out_features=10, bias=True)
    )
    """

    def __init__(self, in_features: int, out_features: int, settings: NetworkSettings) -> None:
        # A named mode: which one is faster could change from run to run, and with it the last bits.
        super().__init__(mode="submatrix")
        activation = _choose(ACTIVATIONS, settings.activation, "network.activation")
        named = {name: kind or nn.Identity for name, kind in NORMALIZATIONS.items()}
        normalization = _choose(named, settings.normalization, "network.normalization")
        normalized = NORMALIZATIONS[settings.normalization] is not None
        dropouts = {name: kind or (lambda *_: nn.Identity()) for name, kind in DROPOUTS.items()}
        dropout = _choose(dropouts, settings.dropout.kind, "network.dropout.kind")
        drops = DROPOUTS[settings.dropout.kind] is not None
        self.pattern_generator = torch.Generator() if settings.dropout.patterns else None
        self.first_pattern = 0
        self.add_module("flatten", nn.Flatten())
        if drops and settings.dropout.input:
            self.add_module("dropout0", dropout(settings.dropout.input, self.pattern_generator))
        for number, width in enumerate(settings.widths, 1):
            self.add_module(f"linear{number}", _linear(in_features, width, bias=not normalized))
            if normalized:
                self.add_module(f"normalization{number}", _normalization(normalization, width))
            self.add_module(f"activation{number}", activation())
            if drops and settings.dropout.hidden:
                self.add_module(f"dropout{number}", dropout(settings.dropout.hidden, self.pattern_generator))
            in_features = width
        self.add_module("output", _linear(in_features, out_features, bias=True))
        self._last_activation = f"activation{len(settings.widths)}"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                self._initialize(module, settings.weight_std)

    def _initialize(self, layer: nn.Linear, std: float) -> None:
        if std:
            nn.init.normal_(layer.weight, std=std)
        elif layer is self.output:
            nn.init.zeros_(layer.weight)
        else:
            nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    def last_activation_input(self, x: Tensor) -> Tensor:
        """The input of the last hidden layer's nonlinearity, (N, width): what Figure 1(b, c) follows over time."""
        for name, module in self.named_children():
            if name == self._last_activation:
                break
            x = module(x)
        return x

    def choose_pattern(self, number: int) -> None:
        """With a limited number of patterns: use this one for the next batch, counted from `first_pattern`."""
        if self.pattern_generator is not None:
            self.pattern_generator.manual_seed(self.first_pattern + number)

    def statistics_layers(self) -> list[BatchNorm1d]:
        """The layers that keep running statistics."""
        return [module for module in self.modules() if isinstance(module, BatchNorm1d)]
