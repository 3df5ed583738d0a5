"""A training loop made of functions: which images, which learning rate, the steps, the measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.lab.networks import MLP, ConvolutionalNetwork
from batchlab.lab.settings import OptimizerSettings

__all__ = [
    "PERCENTILES",
    "activation_percentiles",
    "batch_order",
    "evaluate",
    "evaluation_steps",
    "learning_rate",
    "paused_updates",
    "prepare_images",
    "train",
]

PERCENTILES = (0.15, 0.50, 0.85)  # Ioffe & Szegedy 2015, Figure 1(b, c)


def prepare_images(images: Tensor, binarize: bool) -> Tensor:
    """Pixels (N, H, W) uint8 as float32: 0 or 1 if `binarize` (1 from 128 up), else from 0 to 1."""
    return (images >= 128).float() if binarize else images.float() / 255


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`.

    >>> rate = OptimizerSettings(learning_rate=1.0, schedule="linear", final=0.5)
    >>> learning_rate(rate, 0, 101), learning_rate(rate, 50, 101), learning_rate(rate, 100, 101)
    (1.0, 0.75, 0.5)
    """
    done = step / max(steps - 1, 1)
    final = settings.final
    shares: dict[str, float] = {
        "constant": 1.0,
        "linear": 1 - (1 - final) * done,
        "cosine": final + (1 - final) * (1 + math.cos(math.pi * done)) / 2,
        "exponential": math.pow(final, done),
    }
    return settings.learning_rate * shares[settings.schedule]


def batch_order(count: int, batch_size: int, seed: int, first: int, last: int) -> Iterator[Tensor]:
    """Indices of the images of steps `first` to `last` - 1; each epoch is a new permutation of all `count` images.

    The permutation depends on seed and epoch alone, so a run can go on from any step.
    """
    per_epoch = count // batch_size
    if per_epoch == 0:
        raise ValueError(f"batch_size is {batch_size}, but there are only {count} training images")
    order, current = torch.empty(0), -1
    for step in range(first, last):
        epoch, position = divmod(step, per_epoch)
        if epoch != current:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order, current = torch.randperm(count, generator=generator), epoch
        yield order[position * batch_size : (position + 1) * batch_size]


def evaluation_steps(steps: int, spacing: float, every: int = 0) -> list[int]:
    """After how many steps to evaluate: from 0, each `spacing` later than the last (at least 10 steps), to `steps`.

    Spacing in proportion gives a number of steps to a target the same relative resolution early and late; `every`, if
    it is not 0, evaluates at equal distances instead.

    >>> evaluation_steps(100, 0.5)
    [0, 10, 20, 30, 50, 70, 100]
    >>> evaluation_steps(100, 0.5, every=40)
    [0, 40, 80, 100]
    """
    if every:
        return [*range(0, steps, every), steps]
    points = [0]
    while points[-1] < steps:
        gap = max(10, round(points[-1] * spacing, -1))
        points.append(min(steps, points[-1] + int(gap)))
    return points


def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: OptimizerSettings,
    images: Tensor,
    labels: Tensor,
    order: Iterator[Tensor],
    first: int,
    steps: int,
    patterns: int = 0,
) -> float:
    """Train on the batches of `order`, whose first is step `first` of `steps`; returns the mean cross-entropy.

    With `patterns`, a network's batchwise dropout uses that many patterns in turn.
    """
    network.train()
    total, count = torch.zeros(()), 0
    changing = settings.schedule != "constant"
    for step, indices in enumerate(order, first):
        if changing:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, steps)
        if patterns and isinstance(network, (MLP, ConvolutionalNetwork)):
            network.choose_pattern(step % patterns)
        loss = F.cross_entropy(network(images[indices]), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        count += 1
    return float(total) / max(count, 1)


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, labels: Tensor, chunk: int = 1000) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (the share of right answers) in evaluation mode."""
    network.eval()
    loss, right = 0.0, 0
    for part, answers in zip(images.split(chunk), labels.split(chunk), strict=True):
        outputs = network(part)
        loss += float(F.cross_entropy(outputs, answers, reduction="sum"))
        right += int((outputs.argmax(1) == answers).sum())
    return loss / len(images), right / len(images)


@contextmanager
def paused_updates(network: nn.Module) -> Iterator[None]:
    """Normalize by batches as in training, while running statistics stay as they are."""
    layers: list[Any] = [module for module in network.modules() if hasattr(module, "update_statistics")]
    before = [layer.update_statistics for layer in layers]
    for layer in layers:
        layer.update_statistics = False
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.update_statistics = value


@torch.no_grad()
def activation_percentiles(
    network: MLP | ConvolutionalNetwork, images: Tensor, batch_size: int, units: int
) -> list[list[float]]:
    """The {15, 50, 85}th percentiles of what enters the last hidden layer's first `units` nonlinearities.

    Taken from the network as it trains: batch normalization uses the statistics of each batch of `batch_size` images,
    and its running statistics stay as they are.

    Returns:
        for each unit the three percentiles, in the units of the pre-activation.
    """
    was_training = network.training
    network.train()
    try:
        with paused_updates(network):
            values = torch.cat([network.last_activation_input(part) for part in images.split(batch_size)])
    finally:
        network.train(was_training)
    quantiles = values[:, :units].double().quantile(torch.tensor(PERCENTILES, dtype=torch.float64), dim=0)
    rounded: list[list[float]] = [[round(value, 5) for value in unit] for unit in quantiles.T.tolist()]
    return rounded
