"""The networks of the dropout speed comparison, and one whole training step of each (Graham et al. 2015, Figure 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.functional.dropout_pattern import kept_count
from batchlab.lab.memory import Held, held_for_backward
from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from batchlab.optim import SubmatrixSGD

__all__ = [
    "CONVOLUTIONAL",
    "KINDS",
    "Network",
    "TrainingStep",
    "build",
    "epoch_seconds",
    "held_bytes",
    "mlp",
    "parameter_bytes",
    "random_batches",
    "step_flops",
]

KINDS: Final[dict[str, str]] = {
    "independent": "independent dropout",
    "none": "no dropout",
    "small": "the small dense network",
    "batchwise": "batchwise dropout, submatrices",
    "mask": "batchwise dropout, masks",
    "auto": "batchwise dropout, the faster of the two",
}
"""Ways to build a network. The small one has just the units that batchwise dropout keeps: the limit."""

_MODES: Final = {"batchwise": "submatrix", "mask": "mask", "auto": "auto"}

LEARNING_RATE: Final = 1e-3
MOMENTUM: Final = 0.9


@dataclass(frozen=True)
class Network:
    """Sizes of a chain of layers with ReLUs between them, and what is dropped before each layer.

    Args:
        sizes: features of the input, of each layer, classes.
        rates: share of the features that is dropped before each layer.
        kernels: kernel sizes; so many of the first layers are convolutions, each with a 2x2 max-pooling behind it.
        image: height and width of the input images; 1 without convolutions.
    """

    sizes: tuple[int, ...]
    rates: tuple[float, ...]
    kernels: tuple[int, ...] = ()
    image: int = 1

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or min(self.sizes) < 1 or len(self.rates) != len(self.sizes) - 1:
            raise ValueError(f"sizes {self.sizes} need one rate fewer than there are, not {self.rates}")
        if len(self.kernels) >= len(self.rates):
            raise ValueError(f"kernels {self.kernels}: the last of {len(self.rates)} layers must be linear")

    @property
    def name(self) -> str:
        """Its sizes in words: 784-800-800-10."""
        kernels = [f"C{kernel}-MP2" for kernel in self.kernels] + [""] * (len(self.sizes) - 1 - len(self.kernels))
        words = [str(self.sizes[0]), *(f"{size}{kernel}" for size, kernel in zip(self.sizes[1:], kernels, strict=True))]
        return "-".join(words)

    def small(self) -> Network:
        """The dense network of the kept units: at least one in each layer, and all classes."""
        kept = [max(1, kept_count(size, rate)) for size, rate in zip(self.sizes, self.rates, strict=False)]
        return replace(self, sizes=(*kept, self.sizes[-1]), rates=(0.0,) * len(self.rates))

    def layers(self) -> Iterator[tuple[int, int, int, int]]:
        """For each layer: inputs, outputs, kernel size (0: linear), and output positions (1: linear)."""
        side = self.image
        for index, (inputs, outputs) in enumerate(pairwise(self.sizes)):
            if index < len(self.kernels):
                side -= self.kernels[index] - 1
                yield inputs, outputs, self.kernels[index], side * side
                side //= 2
            else:
                # A flattened feature map is a block of inputs.
                yield inputs * side * side, outputs, 0, 1
                side = 1

    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.sizes[0], self.image, self.image) if self.kernels else (self.sizes[0],)


def mlp(
    widths: tuple[int, ...], *, inputs: int = 784, classes: int = 10, input_rate: float = 0.2, rate: float = 0.5
) -> Network:
    """A multilayer perceptron with dropout of inputs and of hidden units.

    >>> mlp((800, 800)).name, mlp((800, 800)).small().name
    ('784-800-800-10', '627-400-400-10')
    """
    return Network((inputs, *widths, classes), (input_rate, *(rate for _ in widths)))


CONVOLUTIONAL: Final = Network((3, 128, 256, 384, 512, 10), (0.0, 0.5, 0.5, 0.5, 0.5), (3, 2, 2), 24)
"""128C3-MP2-256C2-MP2-384C2-MP2-512N-10N on 24x24 images, dropout 0.5 (Graham et al. 2015, section 4.2)."""


def step_flops(network: Network, batch_size: int) -> int:
    """Floating-point operations of the products of one training step: forward, and both gradients.

    A product costs 2 · batch · inputs · outputs (· kernel² · positions); the first layer has no gradient of its input.

    >>> step_flops(mlp((800, 800)).small(), 100) / step_flops(mlp((800, 800)), 100)
    0.3106...
    """
    total = 0
    for index, (inputs, outputs, kernel, positions) in enumerate(network.layers()):
        products = 2 if index == 0 else 3
        total += products * 2 * batch_size * inputs * outputs * max(1, kernel) ** 2 * positions
    return total


def build(network: Network, kind: str) -> nn.Sequential:
    """The untrained network in one of the `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(map(repr, KINDS))}")
    if kind == "small":
        network = network.small()
    dropout: Callable[[float], nn.Module] = nn.Dropout if kind == "independent" else BatchwiseDropout
    modules: list[nn.Module] = []
    flat = not network.kernels
    for index, (inputs, outputs, kernel, _) in enumerate(network.layers()):
        if network.rates[index] and kind not in ("none", "small"):
            modules.append(dropout(network.rates[index]))
        if kernel:
            modules += [nn.Conv2d(inputs, outputs, kernel), nn.ReLU(), nn.MaxPool2d(2)]
            continue
        if not flat:
            modules.append(nn.Flatten())
            flat = True
        modules.append(nn.Linear(inputs, outputs))
        if index + 1 < len(network.rates):
            modules.append(nn.ReLU())
    if kind in _MODES:
        return SubmatrixSequential(*modules, mode=_MODES[kind])
    return nn.Sequential(*modules)


class TrainingStep:
    """A whole training step as a function without arguments: zero_grad, forward, cross-entropy, backward, update.

    Batchwise kinds are trained by `SubmatrixSGD`, the others by torch's SGD; momentum is 0.9 for all. Batches follow
    each other through the given images, as they lie in memory.

    Args:
        network: sizes and rates.
        kind: one of `KINDS`.
        images: (N, ...), N a multiple of the batch size; the small network takes the first of the features.
        labels: (N,).
        batch_size: samples in a step.
        fused: torch's SGD in one pass over memory, which is faster than its default.
    """

    def __init__(
        self, network: Network, kind: str, images: Tensor, labels: Tensor, batch_size: int, *, fused: bool = False
    ) -> None:
        if len(images) != len(labels) or not len(images) or len(images) % batch_size:
            raise ValueError(f"{len(images)} images and {len(labels)} labels are not whole batches of {batch_size}")
        self.network, self.kind, self.batch_size = network, kind, batch_size
        self.model = build(network, kind).train()
        if kind == "small":
            images = images[:, : network.small().sizes[0]].contiguous()
        self.images, self.labels = images, labels
        if kind in _MODES:
            self.optimizer: torch.optim.Optimizer = SubmatrixSGD(self.model.parameters(), LEARNING_RATE, MOMENTUM)
        else:
            self.optimizer = torch.optim.SGD(
                self.model.parameters(), LEARNING_RATE, MOMENTUM, fused=True if fused else None
            )
        self._next = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the next step."""
        start, self._next = self._next, (self._next + self.batch_size) % len(self.images)
        return self.images[start : start + self.batch_size], self.labels[start : start + self.batch_size]

    def __call__(self) -> None:
        """Take the step."""
        images, labels = self.batch()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()

    def set_rates(self, rate: float) -> None:
        """Change the rates of all dropouts after the first layer, which spares building large networks again."""
        rates = (self.network.rates[0], *(rate for _ in self.network.rates[1:]))
        self.network = replace(self.network, rates=rates)
        dropouts = [module for module in self.model if isinstance(module, (nn.Dropout, BatchwiseDropout))]
        wanted = [value for value in rates if value]
        for module, value in zip(dropouts, wanted, strict=True):
            module.p = value


def random_batches(network: Network, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of normally distributed numbers, and labels; what they are makes no difference to the speed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *network.input_shape(), generator=generator)
    return images, torch.randint(0, network.sizes[-1], (count,), generator=generator)


def held_bytes(step: TrainingStep) -> Held:
    """What the network holds between the forward and the backward pass of a batch, beside its weights and the batch."""
    images, labels = step.batch()
    known = [*step.model.parameters(), *step.model.buffers(), images, labels]
    return held_for_backward(lambda: F.cross_entropy(step.model(images), labels), known, step.batch_size)


def parameter_bytes(network: Network) -> int:
    """Of weights and biases, in float32."""
    return 4 * sum(outputs * (inputs * max(1, kernel) ** 2 + 1) for inputs, outputs, kernel, _ in network.layers())


def epoch_seconds(seconds_per_step: float, images: int, batch_size: int) -> float:
    """Seconds of an epoch, from those of a step.

    >>> epoch_seconds(0.01, 60_000, 100)
    6.0
    """
    return seconds_per_step * math.ceil(images / batch_size)
