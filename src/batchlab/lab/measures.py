"""What is measured on a trained network, beside its accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.lab.networks import MLP, ConvolutionalNetwork
from batchlab.lab.training import paused_updates
from batchlab.nn import BatchNorm1d, BatchNorm2d
from batchlab.reference.batch_norm import Moments, merge_moments, moments

__all__ = ["learned_slopes", "signals", "variance_shifts", "weight_lengths"]

PART = 1000  # images at a time


def learned_slopes(network: nn.Module) -> dict[str, float]:
    """The mean slope of each PReLU for negative inputs, by the module's name."""
    return {
        name: round(float(module.weight.detach().double().mean()), 6)
        for name, module in network.named_modules()
        if isinstance(module, nn.PReLU)
    }


def weight_lengths(network: nn.Module) -> dict[str, float]:
    """The Euclidean length of what each linear or convolution layer learns in its weight's place, by its name.

    length = √Σ v²

    v is the weight; in a factored layer the direction, without its gain. Where the length has no influence on the
    output, as in front of a batch norm, a learning rate turns v by as much as rate / length² would at length 1.

    Source: Ioffe & Szegedy 2015, section 3.3.
    """
    return {
        name: float(getattr(module, "v", module.weight).detach().double().norm())
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


@contextmanager
def _watched(layers: dict[str, nn.Module], found: dict[str, Moments]) -> Iterator[None]:
    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            own = moments(inputs[0].double())
            found[name] = merge_moments(found[name], own) if name in found else own

        return layers[name].register_forward_pre_hook(collect)

    handles = [watch(name) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def variance_shifts(network: nn.Module, images: Tensor) -> dict[str, float]:
    """How far the variance that each batch norm divides by is from the variance of what it gets in evaluation.

    shift = mean over channels of max(v / u, u / v)

    v is the running variance plus eps, u the variance of the layer's input on `images` plus eps.

    1 means that evaluation meets what training has prepared it for; dropout in front makes it larger.

    Source: Li et al. 2018 (arXiv 1801.05134), section 3.
    """
    layers: dict[str, nn.Module] = {
        name: module for name, module in network.named_modules() if isinstance(module, (BatchNorm1d, BatchNorm2d))
    }
    found: dict[str, Moments] = {}
    network.eval()
    with _watched(layers, found):
        for part in images.split(PART):
            network(part)
    shifts = {}
    for name, layer in layers.items():
        assert isinstance(layer.running_var, Tensor)
        count, _, m2 = found[name]
        eps = float(layer.eps)  # type: ignore[arg-type]
        pair = layer.running_var.double() + eps, m2 / (count - 1) + eps
        shifts[name] = round(float((torch.maximum(*pair) / torch.minimum(*pair)).mean()), 6)
    return shifts


def signals(network: MLP | ConvolutionalNetwork, images: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """What enters each hidden nonlinearity, as the network trains: its size, how much of it is signal, its gradient.

    size = mean of E[y²],   differing = mean of Var[y],   gradient = mean of E[(dL/dy)²]      (means over units)

    E and Var are taken over the images, y is the input of a unit's nonlinearity, L an image's cross-entropy. What does
    not differ between images tells nothing about them.

    Batch normalization uses the statistics of `images`, and its running statistics stay as they are.

    Returns:
        "size", "differing" and "gradient", each with one number a hidden layer, from the first to the last.

    Source: He et al. 2015 (arXiv 1502.01852), section 2.2, follows size and gradient from layer to layer.
    """
    entering: list[Tensor] = []
    layers = [module for name, module in network.named_children() if name.startswith("activation")]
    handles = [layer.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0])) for layer in layers]
    was_training = network.training
    network.train()
    try:
        with paused_updates(network), torch.enable_grad():
            loss = F.cross_entropy(network(images), labels, reduction="sum")
            gradients = torch.autograd.grad(loss, entering)
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    found: dict[str, list[float]] = {"size": [], "differing": [], "gradient": []}
    for values, gradient in zip(entering, gradients, strict=True):
        count, mean, m2 = moments(values.detach().double().flatten(1))
        numbers = (mean.square() + m2 / count).mean(), (m2 / count).mean(), gradient.double().square().mean()
        for name, number in zip(found, numbers, strict=True):
            found[name].append(float(f"{float(number):.6g}"))
    return found
