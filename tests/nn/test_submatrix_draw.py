"""Patterns of a whole chain drawn in one call are those that its dropouts draw one by one, or they are not drawn."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import batchlab.nn.submatrix_run as running
from batchlab import kernels
from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from batchlab.nn.submatrix_draw import draw_ahead

Modules = list[nn.Module]


def linears(*between: nn.Module, p: float = 0.5, dim: int = 1) -> Modules:
    return [
        BatchwiseDropout(0.2, dim=dim),
        nn.Linear(40, 30),
        *between,
        BatchwiseDropout(p, dim=dim),
        nn.Linear(30, 20),
        nn.ReLU(),
        BatchwiseDropout(0.3, dim=dim),
        nn.Linear(20, 5),
    ]


def with_one_in_evaluation() -> Modules:
    modules = linears()
    modules[2].eval()
    return modules


TOGETHER: dict[str, tuple[Callable[[], Modules], tuple[int, ...]]] = {
    "linear": (lambda: linears(nn.ReLU()), (6, 40)),
    "sigmoid": (lambda: linears(nn.Sigmoid()), (6, 40)),
    "nested": (lambda: [nn.Sequential(*linears()), nn.ReLU()], (6, 40)),
    "sequences": (lambda: linears(nn.ReLU(), dim=-1), (2, 3, 40)),
    "two in a row": (lambda: linears(BatchwiseDropout(0.4), nn.ReLU()), (6, 40)),
    "all dropped": (lambda: linears(nn.ReLU(), p=1.0), (6, 40)),
    "none dropped": (lambda: linears(nn.ReLU(), p=0.0), (6, 40)),
    "one in evaluation": (with_one_in_evaluation, (6, 40)),
    "at the end": (lambda: [nn.Linear(40, 9), BatchwiseDropout(0.5)], (6, 40)),
}

ONE_BY_ONE: dict[str, tuple[Callable[[], Modules], tuple[int, ...]]] = {
    "random layer": (lambda: linears(nn.Dropout(0.5)), (6, 40)),
    "own generator": (lambda: linears(BatchwiseDropout(0.5, generator=torch.Generator())), (6, 40)),
    "each for itself": (lambda: linears(BatchwiseDropout(0.5, exact=False)), (6, 40)),
    "positions": (lambda: linears(BatchwiseDropout(0.5, dim=1), dim=-1), (2, 3, 40)),
    "convolution": (lambda: [nn.Conv1d(4, 6, 1), BatchwiseDropout(0.5)], (2, 4, 3)),
}


def trained(chain: SubmatrixSequential, shape: tuple[int, ...]) -> tuple[list[Tensor | None], list[Tensor], Tensor]:
    """Patterns, output and gradients, and the generator's state afterwards."""
    torch.manual_seed(7)
    x = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    y = chain(x)
    state = torch.get_rng_state()
    chain.zero_grad()
    y.square().sum().backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in chain.parameters()]
    kept = [module.kept for module in chain.modules() if isinstance(module, BatchwiseDropout)]
    return kept, [y, *gradients], state


@pytest.mark.parametrize("mode", ["submatrix", "mask"])
@pytest.mark.parametrize("name", [*TOGETHER, *ONE_BY_ONE])
def test_together_is_one_by_one(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = (TOGETHER | ONE_BY_ONE)[name]
    chain = SubmatrixSequential(*make(), mode=mode).double()
    for module in chain.modules():
        if isinstance(module, BatchwiseDropout) and module.generator is not None:
            module.generator.manual_seed(1)
    kept, values, state = trained(chain, shape)
    monkeypatch.setattr(running, "draw_ahead", lambda steps, x: {})
    for module in chain.modules():
        if isinstance(module, BatchwiseDropout) and module.generator is not None:
            module.generator.manual_seed(1)
    other_kept, other_values, other_state = trained(chain, shape)
    assert torch.equal(state, other_state)
    for ours, theirs in zip(kept, other_kept, strict=True):
        assert ours is theirs is None or (ours is not None and theirs is not None and torch.equal(ours, theirs))
    for ours, theirs in zip(values, other_values, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", TOGETHER)
def test_plain_chains_draw_together(name: str) -> None:
    make, shape = TOGETHER[name]
    chain = SubmatrixSequential(*make())
    active = [index for index, (_, module, kind) in enumerate(chain.steps()) if kind == "dropout" and module.active]
    assert list(draw_ahead(chain.steps(), torch.zeros(shape))) == active


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_other_chains_do_not(name: str) -> None:
    make, shape = ONE_BY_ONE[name]
    steps = SubmatrixSequential(*make()).steps()
    state = torch.get_rng_state()
    assert draw_ahead(steps, torch.zeros(shape)) == {}
    assert torch.equal(torch.get_rng_state(), state)


def test_what_changes_between_batches_is_seen() -> None:
    chain = SubmatrixSequential(*linears(nn.ReLU()), mode="submatrix")
    x = torch.ones(2, 40)
    chain(x)
    assert [len(chain[i].kept) for i in (0, 3, 6)] == [32, 15, 14]
    chain[3].p = 0.9
    chain[6].eval()
    chain[4] = nn.Linear(30, 10)
    chain[7] = nn.Linear(10, 5)
    chain(x)
    assert [len(chain[i].kept) for i in (0, 3)] == [32, 3]
    assert chain[6].kept is None
    chain[2].register_forward_hook(lambda module, given, result: torch.rand_like(result))
    assert draw_ahead(chain.steps(), x) == {}


def test_without_a_compiler_the_patterns_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = SubmatrixSequential(*linears(nn.ReLU()), mode="submatrix").double()
    expected = trained(chain, (6, 40))
    monkeypatch.setattr(kernels.submatrix, "available", lambda: False)
    found = trained(chain, (6, 40))
    assert torch.equal(expected[2], found[2])
    for ours, theirs in zip(expected[0], found[0], strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
