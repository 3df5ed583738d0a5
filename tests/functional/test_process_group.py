"""Statistics over ranks: gloo processes on uneven parts of a batch, against one process on all of it."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.functional import batch_norm
from batchlab.nn import BatchNorm1d
from tests.processes import spawn

PARTS = {"uneven": (5, 2), "single": (6, 1), "empty": (0, 7), "three": (3, 0, 4), "singles": (1, 1)}


def batch(parts: tuple[int, ...], offset: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(parts))
    n = sum(parts)
    x = torch.randn(n, 3, 4, generator=generator, dtype=torch.float64) + offset
    g = torch.randn(n, 3, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, 1, 4, generator=generator) < 0.7
    return x, g, mask


def layer_step(rank: int, parts: tuple[int, ...], masked: bool) -> list[Tensor]:
    x, g, mask = (t.split(list(parts))[rank].clone() for t in batch(parts, 3.0))
    x.requires_grad_()
    layer = BatchNorm1d(3, dtype=torch.float64, process_group=dist.group.WORLD)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    y = layer(x, mask=mask if masked else None)
    y.backward(g)
    result = [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    return [*result, layer.num_batches_tracked]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for world in (1, 2, 3):
        jobs = [
            (f"{name}-{masked}", layer_step, (parts, masked))
            for name, parts in PARTS.items()
            for masked in (False, True)
            if len(parts) == world
        ]
        if world == 1:
            jobs += [("gradcheck", gradcheck, ()), ("copies", copies, ())]
        if world == 2:
            jobs += [("far", far_from_zero, ((5, 2),)), ("ddp", ddp_steps, ())]
        found |= spawn(world, tmp_path_factory.mktemp(f"world{world}"), jobs)
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", list(PARTS))
def test_ranks_equal_one_big_batch(name: str, masked: bool, ranks: dict[str, list[Any]]) -> None:
    parts, results = PARTS[name], ranks[f"{name}-{masked}"]
    x, g, mask = batch(parts, 3.0)
    x.requires_grad_()
    alone = BatchNorm1d(3, dtype=torch.float64)
    with torch.no_grad():
        alone.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    y = alone(x, mask=mask if masked else None)
    y.backward(g)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), y.detach())
    torch.testing.assert_close(torch.cat([r[1] for r in results]), x.grad)
    torch.testing.assert_close(sum(r[2] for r in results), alone.weight.grad)
    torch.testing.assert_close(sum(r[3] for r in results), alone.bias.grad)
    for r in results:
        torch.testing.assert_close(r[4], alone.running_mean)
        torch.testing.assert_close(r[5], alone.running_var)
        assert r[6].item() == 1


def far_from_zero(rank: int, parts: tuple[int, ...]) -> Tensor:
    x = batch(parts, 1e4)[0].split(list(parts))[rank].float()
    return batch_norm(x, None, None, training=True, process_group=dist.group.WORLD)


def test_ranks_keep_the_digits_of_data_far_from_zero(ranks: dict[str, list[Any]]) -> None:
    y = torch.cat(ranks["far"])
    exact = nn.functional.batch_norm(batch((5, 2), 1e4)[0].float().double(), None, None, training=True)
    assert (y.double() - exact).abs().max() < 3e-6


def gradcheck(rank: int) -> bool:
    torch.manual_seed(0)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, None, True, process_group=dist.group.WORLD)

    return torch.autograd.gradcheck(forward, (x, weight)) and torch.autograd.gradgradcheck(forward, (x, weight))


def test_gradients_of_one_rank(ranks: dict[str, list[Any]]) -> None:
    assert ranks["gradcheck"] == [True]


def ddp_steps(rank: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), BatchNorm1d(3, process_group=dist.group.WORLD), nn.ReLU(), nn.Linear(3, 1))
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    data = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(1))
    for step in range(2):
        optimizer.zero_grad()
        # Two forwards before one backward, as a GAN does it: DDP broadcasts the buffers in between.
        first, second = (wrapped(x) for x in data[step].split(6)[rank].split(3))
        (first.square().mean() + second.square().mean()).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()] + list(model.buffers())


def test_ddp_with_two_forwards_and_equal_ranks(ranks: dict[str, list[Any]]) -> None:
    first, second = ranks["ddp"]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def copies(rank: int) -> tuple[bool, str, str]:
    layer = BatchNorm1d(3, process_group=dist.group.WORLD)
    other = copy.deepcopy(layer)
    shared = other.process_group is layer.process_group
    try:
        pickle.dumps(layer)
        message = ""
    except TypeError as error:
        message = str(error)
    return shared, message, repr(layer)


def test_copying_shares_the_group_and_pickling_explains(ranks: dict[str, list[Any]]) -> None:
    [(shared, message, text)] = ranks["copies"]
    assert shared
    assert "state_dict" in message
    assert "process_group=1 ranks" in text
