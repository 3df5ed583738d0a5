"""The networks of the studies, with every mechanism chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from batchlab.lab.mechanisms import ACTIVATIONS, DROPOUTS, FACTORIZATIONS, INITIAL_SLOPES, NORMALIZATIONS, choose
from batchlab.lab.settings import NetworkSettings, SettingsError
from batchlab.nn import BatchNorm1d, BatchNorm2d, SubmatrixSequential
from batchlab.nn.init import he_normal_
from batchlab.surgery import to_factored, to_natural

__all__ = ["MLP", "ConvolutionalNetwork", "build"]

WEIGHTED: Final = (nn.Linear, nn.Conv2d)


class _Network(SubmatrixSequential):
    """What the networks share: hidden layers of weights, normalization, activation and dropout, and a last Linear."""

    def __init__(self, settings: NetworkSettings) -> None:
        # A named mode: which one is faster could change from run to run, and with it the last bits.
        super().__init__(mode="submatrix")
        self._settings = settings
        choose(ACTIVATIONS, settings.activation, "network.activation")
        choose(NORMALIZATIONS, settings.normalization, "network.normalization")
        choose(DROPOUTS, settings.dropout.kind, "network.dropout.kind")
        choose(dict.fromkeys(FACTORIZATIONS), settings.factorization, "network.factorization")
        self.pattern_generator = torch.Generator() if settings.dropout.patterns else None
        self.first_pattern = 0
        self._last_activation = ""

    def _add_dropout(self, number: int, p: float, spatial: bool = False) -> None:
        kind = DROPOUTS[self._settings.dropout.kind]
        if kind is not None and p:
            self.add_module(f"dropout{number}", kind(p, self.pattern_generator, spatial))

    def _add_hidden(self, number: int, layer: Callable[..., nn.Module], width: int, spatial: bool, last: bool) -> None:
        settings, dropout = self._settings, self._settings.dropout
        kinds = NORMALIZATIONS[settings.normalization]
        self.add_module(f"{'convolution' if spatial else 'linear'}{number}", layer(bias=kinds is None))
        if dropout.position == "before_normalization":
            self._add_dropout(number, dropout.hidden, spatial)
        if kinds is not None:
            self.add_module(f"normalization{number}", _normalization(kinds[spatial], width, spatial))
        self.add_module(f"activation{number}", ACTIVATIONS[settings.activation]())
        self._last_activation = f"activation{number}"
        if spatial:
            self.add_module(f"pooling{number}", nn.MaxPool2d(2))
        if dropout.position == "hidden" or (dropout.position == "last" and last):
            self._add_dropout(number, dropout.hidden, spatial)

    def _add_linear_part(self, number: int, in_features: int, out_features: int) -> None:
        widths = self._settings.widths
        for place, width in enumerate(widths, 1):
            layer = partial(_skip_init, nn.Linear, in_features, width)
            self._add_hidden(number + place, layer, width, False, place == len(widths))
            in_features = width
        self.add_module("output", _skip_init(nn.Linear, in_features, out_features, bias=True))

    def _start(self) -> None:
        """First weights, and then the factors that hold them."""
        layers = [module for module in self.modules() if isinstance(module, WEIGHTED)]
        for layer in layers:
            _initialize(layer, self._settings, first=layer is layers[0], last=layer is layers[-1])
        if self._settings.factorization == "natural":
            to_natural(self, eps=self._settings.natural_eps)
        elif self._settings.factorization != "none":
            # Where a weight loses its mean, the function that it starts from is another one.
            to_factored(self, self._settings.factorization, project=True)

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

    def statistics_layers(self) -> list[BatchNorm1d | BatchNorm2d]:
        """The batch norms, whose running statistics can be recalibrated and folded."""
        return [module for module in self.modules() if isinstance(module, (BatchNorm1d, BatchNorm2d))]


class MLP(_Network):
    """A multilayer perceptron: Linear, normalization, activation, dropout for each hidden layer, and a last Linear.

    Weights start as Gaussians of standard deviation `weight_std`, biases at zero (or otherwise, see the settings). A
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
        super().__init__(settings)
        self.add_module("flatten", nn.Flatten())
        self._add_dropout(0, settings.dropout.input)
        self._add_linear_part(0, in_features, out_features)
        self._start()


class ConvolutionalNetwork(_Network):
    """A small convolutional network: 3x3 convolutions with 2x2 max pooling, then the layers of the `MLP`.

    Convolution, normalization, activation, pooling, dropout for each of `settings.channels`; dropout there takes whole
    feature maps. What is said of weights, biases and seeds at `MLP` holds here.

    Shapes:
        input: (N, H, W) or (N, C, H, W); output: (N, out_features).

    Args:
        image_shape: (H, W) or (C, H, W).
        out_features: classes.
        settings: channels, widths, mechanisms and initialization.

    >>> ConvolutionalNetwork((8, 8), 10, NetworkSettings(widths=(20,), channels=(4,), activation="relu"))
    ConvolutionalNetwork(
      (image): Unflatten(dim=1, unflattened_size=(1, 8))
      (convolution1): Conv2d(1, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
      (activation1): ReLU()
      (pooling1): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
      (flatten): Flatten(start_dim=1, end_dim=-1)
      (linear2): Linear(in_features=64, out_features=20, bias=True)
      (activation2): ReLU()
      (output): Linear(in_features=20, out_features=10, bias=True)
    )
    """

    def __init__(self, image_shape: Sequence[int], out_features: int, settings: NetworkSettings) -> None:
        super().__init__(settings)
        channels, height, width = (1, *image_shape) if len(image_shape) == 2 else tuple(image_shape)
        side = 2 ** len(settings.channels)
        if min(height, width) < side:
            raise SettingsError(
                f"network.channels is {settings.channels}, and each halves the image of {height}x{width}: allowed are "
                f"at most {min(height, width).bit_length() - 1}"
            )
        if len(image_shape) == 2:
            self.add_module("image", nn.Unflatten(1, (1, height)))
        self._add_dropout(0, settings.dropout.input)
        for number, count in enumerate(settings.channels, 1):
            layer = partial(_skip_init, nn.Conv2d, channels, count, 3, padding=1)
            self._add_hidden(number, layer, count, True, False)
            channels, height, width = count, height // 2, width // 2
        self.add_module("flatten", nn.Flatten())
        self._add_linear_part(len(settings.channels), channels * height * width, out_features)
        self._start()


def build(image_shape: Sequence[int], out_features: int, settings: NetworkSettings) -> MLP | ConvolutionalNetwork:
    """The network that the settings describe."""
    if settings.channels:
        return ConvolutionalNetwork(image_shape, out_features, settings)
    return MLP(int(torch.Size(image_shape).numel()), out_features, settings)


def _skip_init(kind: type[nn.Module], *args: Any, **options: Any) -> nn.Module:
    # A layer's own initialization would draw random numbers for a bias too, and arms with and without one would part.
    layer: nn.Module = skip_init(kind, *args, **options)
    return layer


def _normalization(kind: Callable[[int], nn.Module], width: int, spatial: bool) -> nn.Module:
    try:
        return kind(width)
    except ValueError as error:
        name = "channels" if spatial else "widths"
        raise SettingsError(f"network.{name} has {width}, which the normalization refuses: {error}") from error


def _initialize(layer: Any, settings: NetworkSettings, *, first: bool, last: bool) -> None:
    inputs = layer.weight[0].numel()
    if settings.initialization != "gaussian":
        rectified = settings.initialization == "he" and not first
        he_normal_(layer.weight, INITIAL_SLOPES.get(settings.activation, 1.0) if rectified else 1.0)
    elif settings.weight_std:
        nn.init.normal_(layer.weight, std=settings.weight_std)
    elif last:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.uniform_(layer.weight, -(inputs**-0.5), inputs**-0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
