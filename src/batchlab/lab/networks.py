"""The networks of the studies, with every mechanism chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import Tensor, nn
from torch.nn.utils import skip_init

from batchlab.lab.settings import NetworkSettings, SettingsError
from batchlab.nn import BatchNorm1d

__all__ = ["ACTIVATIONS", "MLP", "NORMALIZATIONS"]

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
}


def _choose(options: dict[str, Callable[..., nn.Module]], name: str, what: str) -> Callable[..., nn.Module]:
    if name not in options:
        raise SettingsError(f"{what} is {name!r}; allowed: {', '.join(map(repr, options))}")
    return options[name]


def _linear(in_features: int, out_features: int, bias: bool) -> nn.Module:
    # Linear's own initialization would draw random numbers for a bias too, and arms with and without one would part.
    layer: nn.Module = skip_init(nn.Linear, in_features, out_features, bias=bias)
    return layer


class MLP(nn.Sequential):
    """A multilayer perceptron: Linear, normalization, activation for each hidden layer, and a last Linear.

    Weights start as Gaussians of standard deviation `weight_std`, biases at zero. A hidden Linear before a
    normalization has no bias: mean subtraction would cancel it (Ioffe & Szegedy 2015, section 3.2). The same torch
    seed gives the same weights whatever the normalization.

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
        super().__init__()
        activation = _choose(ACTIVATIONS, settings.activation, "network.activation")
        named = {name: kind or nn.Identity for name, kind in NORMALIZATIONS.items()}
        normalization = _choose(named, settings.normalization, "network.normalization")
        normalized = NORMALIZATIONS[settings.normalization] is not None
        self.add_module("flatten", nn.Flatten())
        for number, width in enumerate(settings.widths, 1):
            self.add_module(f"linear{number}", _linear(in_features, width, bias=not normalized))
            if normalized:
                self.add_module(f"normalization{number}", normalization(width))
            self.add_module(f"activation{number}", activation())
            in_features = width
        self.add_module("output", _linear(in_features, out_features, bias=True))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=settings.weight_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def last_activation_input(self, x: Tensor) -> Tensor:
        """The input of the last hidden layer's nonlinearity, (N, width): what Figure 1(b, c) follows over time."""
        for module in list(self)[:-2]:
            x = module(x)
        return x

    def statistics_layers(self) -> list[BatchNorm1d]:
        """The layers that keep running statistics."""
        return [module for module in self.modules() if isinstance(module, BatchNorm1d)]
