"""Normalizations under `torch.compile` while the batch size changes, as in the last step of every epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import batchlab.nn as ours

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: ours.BatchNorm2d(8),
    "BatchNorm, plain average": lambda: ours.BatchNorm2d(8, momentum=None),
    "BatchNorm, skip": lambda: ours.BatchNorm2d(8, nonfinite="skip"),
    "MeanOnlyBatchNorm": lambda: ours.MeanOnlyBatchNorm2d(8),
    "VarianceOnlyBatchNorm": lambda: ours.VarianceOnlyBatchNorm2d(8, momentum=None),
    "GhostBatchNorm": lambda: ours.GhostBatchNorm2d(8, group_size=4),
    "BatchRenorm": lambda: ours.BatchRenorm2d(8, warmup_steps=1, r_max_steps=4, d_max_steps=5),
    "BatchRenorm, plain average": lambda: ours.BatchRenorm2d(8, warmup_steps=0, momentum=None),
    "NoisyBatchNorm": lambda: ours.NoisyBatchNorm2d(8),
    "PopulationBatchNorm": lambda: ours.PopulationBatchNorm2d(8, refresh_every=2),
    "Whitening, zca": lambda: ours.Whitening2d(8, group_size=4, coloring=True),
    "Whitening, cholesky": lambda: ours.Whitening2d(8, method="cholesky"),
    "Whitening, newton": lambda: ours.Whitening2d(8, group_size=2, method="newton"),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(layer: nn.Module, function: Any, samples: int) -> list[torch.Tensor]:
    """Output and gradients of input and parameters, with noise from one seed."""
    generator = torch.Generator().manual_seed(samples)
    x = (torch.randn(samples, 8, 3, 3, generator=generator) * 2 + 1).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = function(x)
    weights = torch.randn(y.shape, generator=generator)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", LAYERS)
def test_batches_of_several_sizes_in_one_graph(name: str, dynamic: bool | None) -> None:
    eager = LAYERS[name]()
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for samples in (16, 16, 9, 6, 7):
        torch.testing.assert_close(gradients(layer, compiled, samples), gradients(eager, eager, samples))
        for key, value in eager.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("seen", [0, 2, 10])
def test_weights_of_compiled_batch_renorm_have_the_gradients_of_this_steps_limits(seen: int) -> None:
    """Not those of the next step, which the counter has moved on to when the backward pass runs."""
    eager = ours.BatchRenorm2d(8, warmup_steps=1, r_max_steps=4, d_max_steps=5)
    assert eager.num_batches_tracked is not None
    eager.num_batches_tracked.fill_(seen)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(gradients(layer, compiled, 6), gradients(eager, eager, 6))
