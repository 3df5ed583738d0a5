"""Examples and batches in containers of every kind: each tensor in them is seen, none of the caller's is changed."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from batchlab.surgery import fold, initialize, insert_batch_norm, recalibrate


class Named(NamedTuple):
    x: Tensor
    mask: Tensor


@dataclasses.dataclass(frozen=True)
class Data:
    x: Tensor
    mask: Tensor


class Other:
    def __init__(self, x: Tensor, mask: Tensor) -> None:
        self.x, self.mask = x, mask


def _ordered(x: Tensor, mask: Tensor) -> OrderedDict[str, Tensor]:
    return OrderedDict(x=x, mask=mask)


def _user(x: Tensor, mask: Tensor) -> UserDict[str, Tensor]:
    return UserDict({"x": x, "mask": mask})


CONTAINERS = [Named, Data, _ordered, _user]


class Net(nn.Module):
    def __init__(self, looks: bool = False, writes: bool = False) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
        self.looks, self.writes = looks, writes
        self.norm.running_mean = torch.randn(4)
        self.norm.running_var = torch.rand(4) + 0.5

    def forward(self, batch: Any) -> Tensor:
        x, mask = (batch["x"], batch["mask"]) if hasattr(batch, "keys") else (batch.x, batch.mask)
        y: Tensor = self.convolution(x.mul_(2) if self.writes else x)
        if self.looks and not mask.all():
            y = y * mask[:, None]
        return self.norm(y)  # type: ignore[no-any-return]


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 5), torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize("container", CONTAINERS)
def test_folds_for_other_inputs_too(container: Any) -> None:
    net = Net().eval()
    folded, report = fold(net, (container(*inputs()),))
    assert len(report.folded) == 1
    other = container(*inputs())
    torch.testing.assert_close(folded(other), net(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_branch_on_what_is_in_it_is_refused(container: Any) -> None:
    with pytest.raises(ValueError, match="cannot be traced"):
        fold(Net(looks=True).eval(), (container(*inputs()),))


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_example_stays_as_it_is(container: Any) -> None:
    x, mask = inputs()
    before = x.clone()
    fold(Net(writes=True).eval(), (container(x, mask),))
    insert_batch_norm(nn.Sequential(Net(writes=True), nn.ReLU()), (container(x, mask),))
    assert torch.equal(x, before)


def test_tensors_that_nobody_sees_are_refused() -> None:
    with pytest.raises(ValueError, match="an object of Other with tensors in it"):
        fold(Net().eval(), (Other(*inputs()),))


@pytest.mark.parametrize("container", CONTAINERS)
def test_batches_of_any_kind_are_moved(container: Any) -> None:
    seen = []

    def forward(model: nn.Module, batch: Any) -> None:
        seen.append((batch["x"] if hasattr(batch, "keys") else batch.x).device.type)
        model(torch.randn(9, 4))

    recalibrate(nn.Sequential(nn.BatchNorm1d(4)), [container(*inputs())], device="meta", forward=forward)
    assert seen == ["meta"]


def test_an_exception_while_weights_are_written_takes_them_all_back() -> None:
    first = nn.Linear(4, 4)
    last = nn.Linear(4, 4)
    last.weight = nn.Parameter(torch.randn(1, 4).expand(4, 4))
    before = first.weight.detach().clone()
    with pytest.raises(RuntimeError):
        initialize(nn.Sequential(first, nn.ReLU(), last))
    assert torch.equal(first.weight, before)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) / len(self.layers)  # type: ignore[no-any-return]


def test_a_forward_that_counts_its_layers_is_refused() -> None:
    model = Mean()
    with pytest.raises(ValueError, match="nothing was inserted"):
        insert_batch_norm(model, torch.randn(8, 4))
    assert len(model.layers) == 2
