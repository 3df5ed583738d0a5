"""A gradient stored as blocks: to everybody but its optimizer it is the dense tensor."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchlab.functional import SubmatrixGradient
from batchlab.functional.submatrix import ACCEPTS
from batchlab.functional.submatrix_gradient import Block
from batchlab.nn import BatchwiseDropout, SubmatrixSequential

SHAPE = torch.Size([5, 7])


def block(seed: int = 0, factors: bool = False) -> Block:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(5, generator=generator)[:3].sort().values
    columns = torch.randperm(7, generator=generator)[:4].sort().values
    left, right = torch.randn(6, 3, generator=generator), torch.randn(6, 4, generator=generator)
    if factors:
        return Block(rows, columns, None, (left, right, 1.5))
    return Block(rows, columns, 1.5 * left.t() @ right)


def gradient(*seeds: int, factors: bool = False) -> SubmatrixGradient:
    return SubmatrixGradient(SHAPE, [block(seed, factors) for seed in seeds or (0,)])


def net() -> SubmatrixSequential:
    torch.manual_seed(0)
    modules = [
        nn.Linear(6, 9),
        nn.ReLU(),
        BatchwiseDropout(),
        nn.Linear(9, 8),
        nn.ReLU(),
        BatchwiseDropout(),
        nn.Linear(8, 2),
    ]
    found = SubmatrixSequential(*modules, mode="submatrix")
    for parameter in found.parameters():
        setattr(parameter, ACCEPTS, True)
    return found


def plain(chain: SubmatrixSequential) -> nn.Sequential:
    return nn.Sequential(*copy.deepcopy(list(chain)))


def backward(chain: nn.Module, *seeds: int) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        chain(torch.ones(4, 6) + seed).square().sum().backward()


def same_gradients(a: nn.Module, b: nn.Module) -> None:
    for (name, one), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.to_dense(), other.grad, msg=lambda text, n=name: f"{n}: {text}")


def test_factors_equal_values() -> None:
    eager, lazy = gradient(0), gradient(0, factors=True)
    assert lazy.blocks[0].factors is not None
    assert repr(lazy) == repr(eager) == "SubmatrixGradient(shape=(5, 7), kept=3 x 4)"
    assert lazy.blocks[0].factors is not None  # repr asks for nothing
    torch.testing.assert_close(lazy.to_dense(), eager.to_dense())
    assert lazy.blocks[0].factors is None
    assert (lazy.to_dense() != 0).sum() == 12


def test_the_optimizers_gradient_has_no_graph() -> None:
    chain = net()
    backward(chain, 0)
    for parameter in chain.parameters():
        assert not parameter.grad.requires_grad
        assert not parameter.grad.to_dense().requires_grad


@pytest.mark.parametrize("seeds", [(0,), (0, 0), (0, 1), (0, 1, 2)], ids=["one", "same-pattern", "two", "three"])
def test_accumulates(seeds: tuple[int, ...]) -> None:
    chain = net()
    other = plain(chain)
    backward(chain, *seeds)
    backward(other, *seeds)
    assert len(chain[3].weight.grad.blocks) == len(seeds)
    same_gradients(chain, other)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "abs": torch.abs,
    "add-dense": lambda g: g + torch.ones(5, 7),
    "add-number": lambda g: g + 1,
    "add-self": lambda g: g + g,
    "alpha": lambda g: torch.add(g, g, alpha=2),
    "add-other": lambda g: g + SubmatrixGradient(SHAPE, [block(9)]),
    "subtract": lambda g: torch.ones(5, 7) - g,
    "multiply": lambda g: 3 * g,
    "multiply-scalar-tensor": lambda g: g * torch.tensor(2.0),
    "multiply-dense": lambda g: g * torch.arange(7.0),
    "divide": lambda g: g / 2,
    "divide-rounded": lambda g: torch.div(g, 0.3, rounding_mode="floor"),
    "matmul": lambda g: g @ torch.ones(7, 2),
    "transpose": lambda g: g.t(),
    "view": lambda g: g.view(-1),
    "item": lambda g: g[2],
    "mean": lambda g: g.mean(),
    "norm": lambda g: g.norm(),
    "norm-1": lambda g: torch.linalg.vector_norm(g, 1),
    "norm-0": lambda g: torch.linalg.vector_norm(g, 0),
    "norm-inf": lambda g: torch.linalg.vector_norm(g, float("inf")),
    "norm-minus-inf": lambda g: torch.linalg.vector_norm(g, -float("inf")),
    "norm-ord": lambda g: torch.linalg.vector_norm(g, ord=3),
    "norm-dim": lambda g: torch.linalg.vector_norm(g, 2, dim=0),
    "norm-dtype": lambda g: torch.linalg.vector_norm(g, 2, dtype=torch.float64),
    "foreach-norm": lambda g: torch._foreach_norm([g, torch.ones(3)])[0],
    "foreach-norm-1": lambda g: torch._foreach_norm([g], 1)[0],
    "foreach-norm-dtype": lambda g: torch._foreach_norm([g], ord=1, dtype=torch.float64)[0],
    "clone": torch.clone,
    "detach": lambda g: g.detach(),
    "data": lambda g: g.data,
    "double": lambda g: g.double(),
    "equal": lambda g: torch.tensor(torch.equal(g, g)),
    "stack": lambda g: torch.stack([g, g]),
    "where": lambda g: torch.where(g > 0, g, torch.zeros(())),
    "isfinite": torch.isfinite,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "copy-into-dense": lambda g: torch.empty(5, 7).copy_(g),
    "add-into-dense": lambda g: torch.ones(5, 7).add_(g, alpha=0.5),
    "lerp": lambda g: torch.ones(5, 7).lerp_(g, 0.1),
    "addcmul": lambda g: torch.ones(5, 7).addcmul_(g, g),
    "new-zeros": lambda g: g.new_zeros(3),
    "numpy": lambda g: (
        torch.tensor(g.numpy()) if not isinstance(g, SubmatrixGradient) else torch.tensor(g.to_dense().numpy())
    ),
}


def variants() -> Iterator[tuple[str, Callable[[], SubmatrixGradient]]]:
    yield "one", gradient
    yield "factors", lambda: gradient(factors=True)
    yield "two", lambda: gradient(0, 1)
    yield "none", lambda: SubmatrixGradient(SHAPE, [], like=torch.zeros(()))
    yield (
        "all",
        lambda: SubmatrixGradient(
            SHAPE, [Block(None, None, torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))]
        ),
    )


VARIANTS = dict(variants())


def as_dense(value: Tensor) -> Tensor:
    return value.to_dense() if isinstance(value, SubmatrixGradient) else value


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_see_the_dense_tensor(name: str, variant: str) -> None:
    short = VARIANTS[variant]()
    full = VARIANTS[variant]().to_dense()
    torch.testing.assert_close(as_dense(OPERATIONS[name](short)), OPERATIONS[name](full))
    torch.testing.assert_close(short.to_dense(), full)  # and change nothing


WRITES: dict[str, Callable[[Any], Any]] = {
    "zero": lambda g: g.zero_(),
    "multiply": lambda g: g.mul_(2),
    "multiply-tensor": lambda g: g.mul_(torch.tensor(0.5)),
    "divide": lambda g: g.div_(4),
    "multiply-dense": lambda g: g.mul_(torch.arange(7.0)),
    "add": lambda g: g.add_(1),
    "add-dense": lambda g: g.add_(torch.ones(5, 7), alpha=0.5),
    "add-short": lambda g: g.add_(gradient(4)),
    "add-itself": lambda g: g.add_(g).mul_(2),
    "clamp": lambda g: g.clamp_(-0.5, 0.4),
    "clamp-min": lambda g: g.clamp_(min=-0.1),
    "clamp-max": lambda g: g.clamp_(max=0.1),
    "clamp-above": lambda g: g.clamp_(0.2, 0.4),
    "copy-dense": lambda g: g.copy_(torch.ones(5, 7)),
    "copy-short": lambda g: g.copy_(gradient(5)),
    "fill": lambda g: g.fill_(3),
    "index-put": lambda g: g.__setitem__(torch.ones(5, 7, dtype=torch.bool), 2.0),
    "foreach-multiply": lambda g: torch._foreach_mul_([g], 2.0),
    "foreach-multiply-tensor": lambda g: torch._foreach_mul_([g], torch.tensor(2.0)),
    "foreach-divide": lambda g: torch._foreach_div_([g], 2.0),
    "foreach-each": lambda g: torch._foreach_mul_([g], [3.0]),
    "foreach-clamp": lambda g: (torch._foreach_clamp_min_([g], -0.1), torch._foreach_clamp_max_([g], 0.2)),
    "unscale": lambda g: torch._amp_foreach_non_finite_check_and_unscale_([g], torch.zeros(1), torch.tensor([0.5])),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("through", ["itself", "data"])
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_seen(name: str, through: str, variant: str) -> None:
    short, full = VARIANTS[variant](), VARIANTS[variant]().to_dense()
    result = WRITES[name](short if through == "itself" else short.data)
    WRITES[name](full)
    torch.testing.assert_close(short.to_dense(), full)
    if isinstance(result, Tensor):
        torch.testing.assert_close(as_dense(result), full)


STAY_SHORT = [
    "zero", "multiply", "multiply-tensor", "divide", "add-short", "clamp", "clamp-min", "clamp-max", "copy-short",
    "foreach-multiply", "foreach-multiply-tensor", "foreach-divide", "foreach-clamp", "unscale",
]  # fmt: skip


@pytest.mark.parametrize("name", STAY_SHORT)
def test_what_leaves_zeros_at_zero_stays_short(name: str) -> None:
    short = gradient()
    WRITES[name](short)
    assert all(b.rows is not None for b in short.blocks)


def test_sums_and_clones_share_nothing() -> None:
    for factors in (False, True):
        a, b = gradient(0, factors=factors), gradient(1, factors=factors)
        first, second = a.to_dense().clone(), gradient(1).to_dense()
        total, twin = a + b, a.clone()
        total.mul_(3)
        twin.mul_(5)
        a.add_(b)
        a.mul_(2)
        torch.testing.assert_close(b.to_dense(), second)
        torch.testing.assert_close(a.to_dense(), 2 * (first + second))
        torch.testing.assert_close(total.to_dense(), 3 * (first + second))


def test_repr() -> None:
    assert repr(gradient(0, 1)) == "SubmatrixGradient(shape=(5, 7), kept=3 x 4 + 3 x 4)"
    assert repr(SubmatrixGradient(SHAPE, [], like=torch.zeros(()))) == "SubmatrixGradient(shape=(5, 7), kept=nothing)"
    assert "SubmatrixGradient" in f"{gradient()}"
    with pytest.raises(ValueError, match="needs a block, or like="):
        SubmatrixGradient(SHAPE, [])
    with pytest.raises(ValueError, match="values or factors"):
        Block(None, None, None).values  # noqa: B018


@pytest.mark.parametrize("variant", VARIANTS)
def test_saves_as_a_dense_tensor(variant: str) -> None:
    short = VARIANTS[variant]()
    stream = io.BytesIO()
    torch.save({"grad": short}, stream)
    stream.seek(0)
    found = torch.load(stream)["grad"]
    assert type(found) is Tensor
    torch.testing.assert_close(found, short.to_dense())


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one", "two"])
def test_clipping(seeds: tuple[int, ...], foreach: bool | None) -> None:
    chain = net()
    other = plain(chain)
    backward(chain, *seeds)
    backward(other, *seeds)
    for order in (2.0, 1.0, float("inf")):
        norms = [
            torch.nn.utils.clip_grad_norm_(one.parameters(), 0.3, order, foreach=foreach) for one in (chain, other)
        ]
        torch.testing.assert_close(*norms)
    same_gradients(chain, other)
    for one in (chain, other):
        torch.nn.utils.clip_grad_value_(one.parameters(), 0.01, foreach=foreach)
    same_gradients(chain, other)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool) -> None:
    chain = net()
    other = plain(chain)
    for one in (chain, other):
        backward(one, 0)
        one.zero_grad(set_to_none=to_none)
        if not to_none:
            assert all(not as_dense(p.grad).any() for p in one.parameters())
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0, foreach=True)
        backward(one, 1)
    same_gradients(chain, other)


def triple(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(3)


def test_hooks_see_it_and_may_replace_it() -> None:
    chain = net()
    other = plain(chain)
    seen: list[Tensor] = []
    chain[3].weight.register_hook(seen.append)  # holds it: autograd then copies
    for one in (chain, other):
        one[6].weight.register_hook(lambda g: g * 2)
        one[3].bias.register_post_accumulate_grad_hook(triple)
    backward(chain, 0)
    backward(other, 0)
    same_gradients(chain, other)
    assert isinstance(seen[0], SubmatrixGradient)
    assert isinstance(chain[3].weight.grad, SubmatrixGradient)
    assert chain[3].weight.grad.blocks[0].rows is not None
    before = seen[0].to_dense().clone()
    chain[3].weight.grad.mul_(2)
    torch.testing.assert_close(seen[0].to_dense(), before)


def test_the_same_graph_twice() -> None:
    chain = net()
    other = plain(chain)
    for one in (chain, other):
        torch.manual_seed(0)
        loss = one(torch.ones(4, 6)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    same_gradients(chain, other)


def test_autograd_grad_returns_it() -> None:
    chain = net()
    other = plain(chain)
    found = []
    for one in (chain, other):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(one(torch.ones(4, 6)).square().sum(), list(one.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(as_dense(a), b)


def test_a_gradient_given_from_outside_is_not_changed() -> None:
    chain = SubmatrixSequential(nn.Linear(3, 4), BatchwiseDropout(), mode="submatrix")
    for dtype in (torch.float32, torch.bfloat16):
        chain = chain.to(dtype)
        for parameter in chain.parameters():
            parameter.grad = None
            setattr(parameter, ACCEPTS, True)
        chain[1].dim = -1
        y = chain(torch.ones(3, dtype=dtype))
        given = torch.ones_like(y)
        y.backward(given)
        chain[0].bias.grad.mul_(7)
        chain[0].weight.grad.mul_(7)
        assert torch.equal(given, torch.ones_like(y))


def test_channels_last_parameters_keep_it() -> None:
    torch.manual_seed(0)
    chain = SubmatrixSequential(nn.Conv2d(3, 6, 3), nn.ReLU(), BatchwiseDropout(), nn.Conv2d(6, 4, 3), mode="submatrix")
    chain = chain.to(memory_format=torch.channels_last)
    for parameter in chain.parameters():
        setattr(parameter, ACCEPTS, True)
    other = plain(chain)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    for one in (chain, other):
        for seed in range(2):
            torch.manual_seed(seed)
            one(x).square().sum().backward()
    assert isinstance(chain[0].weight.grad, SubmatrixGradient)
    assert isinstance(chain[3].weight.grad, SubmatrixGradient)
    assert chain[3].weight.grad.stride() == chain[3].weight.stride()
    same_gradients(chain, other)
