"""The optimizer of a run, and what has to happen before its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchlab.lab.settings import NetworkSettings, OptimizerSettings
from batchlab.optim import NaturalRefresh, PathSGD, SubmatrixSGD
from batchlab.surgery import initialize_from_data

__all__ = ["follow", "make_optimizer", "prepare"]

START_IMAGES = 500
"""For gains that start from data: the number in the code of Salimans & Kingma (2016)."""
COLLECTED_IMAGES = 5000
"""For the first natural coordinates; several times the 784 inputs of a first layer."""


def make_optimizer(network: nn.Module, settings: OptimizerSettings, images: Tensor) -> torch.optim.Optimizer:
    """The optimizer of the settings: for "sgd" one fused pass over parameters, gradients and momentum.

    Args:
        network: whose parameters it has.
        settings: of the optimizer.
        images: as the network takes them; Path-SGD looks at the shape of one.
    """
    options: dict[str, Any] = {"lr": settings.learning_rate, "momentum": settings.momentum}
    if settings.algorithm == "path_sgd":
        return PathSGD(network.parameters(), **options, model=network, example_input=images[:1])
    options |= {"weight_decay": settings.weight_decay, "nesterov": settings.nesterov}
    if settings.algorithm == "submatrix_sgd":
        return SubmatrixSGD(network.parameters(), **options)
    return torch.optim.SGD(network.parameters(), **options, fused=True)


def prepare(network: nn.Module, settings: NetworkSettings, images: Tensor) -> None:
    """What a fresh network learns from the first training images without a gradient.

    Gains of factored layers that start from data; the first coordinates of natural layers.
    """
    if settings.data_start:
        initialize_from_data(network, images[:START_IMAGES])
    if settings.factorization == "natural":
        network.train()
        with torch.no_grad():
            for part in images[:COLLECTED_IMAGES].split(START_IMAGES):
                network(part)
        # Before the first step there is no momentum to transport: any optimizer will do.
        NaturalRefresh(network, torch.optim.SGD(network.parameters(), lr=0.0)).refresh()


def follow(network: nn.Module, settings: NetworkSettings, used: torch.optim.Optimizer, steps: int) -> None:
    """From now on refresh natural layers after every so many of the optimizer's steps, of which `steps` are done."""
    if settings.factorization == "natural":
        refresh = NaturalRefresh(network, used, every=settings.refresh_every)
        refresh.load_state_dict({"steps": steps})

        def count(*_: Any) -> None:
            refresh.step()

        used.register_step_post_hook(count)
