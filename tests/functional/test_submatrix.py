"""Patterns, and layers on kept rows and columns: against the dense layer on masked inputs, in float64."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab.functional import SubmatrixGradient, draw_pattern, submatrix, submatrix_conv, submatrix_linear
from batchlab.functional.dropout_pattern import inverted_scale, kept_count
from batchlab.functional.submatrix import ACCEPTS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


# Patterns.


@pytest.mark.parametrize("p", [0, 0.0, 0.2, 0.5, 0.9, 0.999, 1, 1.0])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 784])
def test_exact_patterns_have_their_count(n: int, p: float) -> None:
    for seed in range(3):
        kept = draw_pattern(n, p, generator=generator(seed))
        assert kept.dtype == torch.int64
        assert len(kept) == kept_count(n, p) == round(n * (1 - p))
        assert (kept[1:] > kept[:-1]).all()
        assert n == 0 or len(kept) == 0 or (kept[0] >= 0 and kept[-1] < n)


def test_exact_patterns_are_uniform() -> None:
    """Inclusion of single features and of pairs: chi-square over many draws, at about five standard deviations."""
    n, draws, source = 8, 8000, generator(1)
    counts: Counter[Any] = Counter()
    for _ in range(draws):
        kept = tuple(draw_pattern(n, 0.5, generator=source).tolist())
        counts.update(kept)
        counts.update(itertools.combinations(kept, 2))
        counts[("whole", kept)] += 1
    for events, probability in (
        (list(range(n)), 1 / 2),
        (list(itertools.combinations(range(n), 2)), 4 / 8 * 3 / 7),
        ([("whole", c) for c in itertools.combinations(range(n), 4)], 1 / math.comb(8, 4)),
    ):
        expected = draws * probability
        statistic = sum((counts[e] - expected) ** 2 for e in events) / (expected * (1 - probability))
        degrees = len(events)
        assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees) + 5


def test_bernoulli_patterns_have_their_rate() -> None:
    source = generator(2)
    sizes = torch.tensor([len(draw_pattern(100, 0.3, exact=False, generator=source)) for _ in range(2000)]).double()
    assert sizes.mean().item() == pytest.approx(70, abs=5 * math.sqrt(21 / 2000))
    assert sizes.var().item() == pytest.approx(21, rel=0.2)
    assert len(draw_pattern(50, 0.0, exact=False)) == 50
    assert len(draw_pattern(50, 1.0, exact=False)) == 0


@pytest.mark.parametrize("exact", [True, False])
def test_a_seed_gives_the_same_patterns(exact: bool) -> None:
    first = draw_pattern(50, 0.5, exact=exact, generator=generator(3))
    assert torch.equal(first, draw_pattern(50, 0.5, exact=exact, generator=generator(3)))
    torch.manual_seed(3)
    assert torch.equal(first, draw_pattern(50, 0.5, exact=exact))
    assert not torch.equal(first, draw_pattern(50, 0.5, exact=exact))


def test_bad_arguments_of_a_pattern() -> None:
    for p in (-0.1, 1.1, float("nan"), "half", True, None):
        with pytest.raises(ValueError, match="share of features to drop, from 0 to 1"):
            draw_pattern(5, p)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_features is -1"):
        draw_pattern(-1, 0.5)
    with pytest.raises(ValueError, match="drawn on the CPU"):
        draw_pattern(5, 0.5, generator=type("OnGPU", (), {"device": torch.device("cuda")})())


def test_scales() -> None:
    assert inverted_scale(10, 4, 0.6, True) == 2.5
    assert inverted_scale(10, 0, 1.0, True) == 1.0
    assert inverted_scale(10, 3, 0.5, False) == 2.0
    assert inverted_scale(10, 0, 1.0, False) == 1.0


# Layers.

KEPT = {
    "all": (None, None),
    "inputs": (torch.tensor([0, 2, 3, 6]), None),
    "outputs": (None, torch.tensor([1, 4])),
    "both": (torch.tensor([1, 2, 6]), torch.tensor([0, 3, 4])),
    "one": (torch.tensor([5]), torch.tensor([2])),
    "every": (torch.arange(7), torch.arange(5)),
}


def select(x: Tensor, kept: Tensor | None, dim: int) -> Tensor:
    return x if kept is None else x.index_select(dim, kept)


def masked(x: Tensor, kept: Tensor | None, dim: int) -> Tensor:
    if kept is None:
        return x
    shape = [1] * x.ndim
    shape[dim] = x.shape[dim]
    return x * torch.zeros(x.shape[dim], dtype=x.dtype).index_fill(0, kept, 1).view(shape)


@pytest.mark.parametrize("accepts", [False, True], ids=["dense", "short"])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (1, 7), (3, 2, 7), (0, 7), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", KEPT)
def test_linear_equals_masks(name: str, bias: bool, shape: tuple[int, ...], accepts: bool) -> None:
    inputs, outputs = KEPT[name]
    x, weight = randn(*shape), randn(5, 7, seed=1).requires_grad_()
    b = randn(5, seed=2).requires_grad_() if bias else None
    sources = [x, weight] + ([b] if b is not None else [])
    x.requires_grad_()
    expected = select(F.linear(masked(1.5 * x, inputs, -1), weight, b), outputs, -1)
    wanted = torch.autograd.grad(expected.sin().sum(), sources)
    if accepts:
        setattr(weight, ACCEPTS, True)
    y = submatrix_linear(select(x, inputs, -1), weight, b, inputs, outputs, scale=1.5)
    found = torch.autograd.grad(y.sin().sum(), sources)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert isinstance(found[1], SubmatrixGradient) == (accepts and name != "all")
    for a, e in zip(found, wanted, strict=True):
        a = a.to_dense() if isinstance(a, SubmatrixGradient) else a
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        assert not a[e == 0].any()  # what was dropped: exactly zero


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": ((7, 9), (3,), {}),
    "1d-unbatched": ((9,), (3,), {}),
    "2d": ((9, 8), (3, 3), {"padding": 1}),
    "2d-same": ((9, 8), (3, 2), {"padding": "same"}),
    "2d-stride": ((9, 8), (2, 3), {"stride": (2, 1), "padding": (1, 0)}),
    "2d-dilation": ((9, 8), (3, 3), {"dilation": 2}),
    "2d-pixel": ((5, 5), (1, 1), {}),
    "3d": ((4, 5, 4), (2, 3, 1), {"padding": "valid"}),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_equals_masks(name: str, kept: str, bias: bool) -> None:
    size, kernel, options = CONVOLUTIONS[name]
    spatial = len(kernel)
    inputs, outputs = KEPT[kept]
    shape = (7, *size) if name == "1d-unbatched" else (2, 7, *size[-spatial:])
    x, weight = randn(*shape).requires_grad_(), randn(5, 7, *kernel, seed=1).requires_grad_()
    b = randn(5, seed=2).requires_grad_() if bias else None
    sources = [x, weight] + ([b] if b is not None else [])
    convolve = getattr(F, f"conv{spatial}d")
    dim = -1 - spatial
    expected = select(convolve(masked(1.5 * x, inputs, dim), weight, b, **options), outputs, dim)
    y = submatrix_conv(select(x, inputs, dim), weight, b, inputs, outputs, scale=1.5, **options)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    wanted, found = (torch.autograd.grad(value.sin().sum(), sources) for value in (expected, y))
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        assert not a[e == 0].any()


@pytest.mark.parametrize("accepts", [False, True], ids=["dense", "short"])
@pytest.mark.parametrize("kept", ["all", "both", "inputs"])
def test_gradients_of_both_orders(kept: str, accepts: bool) -> None:
    inputs, outputs = KEPT[kept]
    x, weight, b = randn(3, 7)[:, : 7 if inputs is None else len(inputs)], randn(5, 7, seed=1), randn(5, seed=2)
    arguments = [t.clone().requires_grad_() for t in (x, weight, b)]
    if accepts:
        setattr(arguments[1], ACCEPTS, True)

    def linear(x: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        return submatrix_linear(x, weight, b, inputs, outputs, scale=1.5).sin()

    if not accepts:
        assert torch.autograd.gradcheck(linear, arguments)
    assert torch.autograd.gradgradcheck(linear, arguments)
    kernel = randn(5, 7, 2, seed=3).requires_grad_()
    maps = randn(2, x.shape[1], 4, seed=4).requires_grad_()

    def convolution(x: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        return submatrix_conv(x, weight, b, inputs, outputs).sin()

    assert torch.autograd.gradcheck(convolution, [maps, kernel, arguments[2]])
    assert torch.autograd.gradgradcheck(convolution, [maps, kernel, arguments[2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    inputs, outputs = KEPT["both"]
    x, weight, b = randn(6, 3, dtype=dtype), randn(5, 7, seed=1, dtype=dtype), randn(5, seed=2, dtype=dtype)
    expected = 1.5 * x.double() @ weight.double()[outputs][:, inputs].t() + b.double()[outputs]
    y = submatrix_linear(x, weight, b, inputs, outputs, scale=1.5)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_strided_inputs_and_weights() -> None:
    inputs, outputs = KEPT["both"]
    x, weight, b = randn(3, 6).t(), randn(7, 5, seed=1).t(), randn(10, seed=2)[::2]
    expected = F.linear(x, weight[outputs][:, inputs], b[outputs])
    torch.testing.assert_close(submatrix_linear(x, weight, b, inputs, outputs), expected)
    weight = weight.contiguous()
    torch.testing.assert_close(submatrix_linear(x, weight, b.contiguous(), inputs, outputs), expected)
    torch.testing.assert_close(submatrix_linear(x, weight, b, inputs, outputs), expected)


def test_autocast() -> None:
    inputs, outputs = KEPT["both"]
    x, weight = randn(6, 3, dtype=torch.float32), randn(5, 7, seed=1, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = submatrix_linear(x, weight, None, inputs, outputs)
        maps = submatrix_conv(x.view(2, 3, 3), weight.view(5, 7, 1), None, inputs, outputs)
    assert y.dtype == maps.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert int((weight.grad != 0).sum()) == 9


def test_functional_transforms() -> None:
    inputs, outputs = KEPT["both"]
    x, weight, b = randn(4, 3), randn(5, 7, seed=1), randn(5, seed=2)

    def loss(weight: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return submatrix_linear(x, weight, b, inputs, outputs, scale=2.0).square().sum()

    found = torch.func.grad(loss, (0, 1))(weight, b, x)
    leaves = [weight.clone().requires_grad_(), b.clone().requires_grad_()]
    wanted = torch.autograd.grad(loss(*leaves, x), leaves)
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e)
    each = torch.func.vmap(torch.func.grad(loss), (None, None, 0))(weight, b, x)
    torch.testing.assert_close(each.sum(0), wanted[0])
    ensemble = torch.func.vmap(submatrix_linear, (None, 0, 0, None, None))
    y = ensemble(x, torch.stack([weight, 2 * weight]), torch.stack([b, b]), inputs, outputs)
    torch.testing.assert_close(y[1], submatrix_linear(x, 2 * weight, b, inputs, outputs))
    jacobian = torch.func.jacfwd(lambda x: submatrix_linear(x, weight, b, inputs, outputs))(x[0])
    torch.testing.assert_close(jacobian, weight[outputs][:, inputs])


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()

    def step(x: Tensor, maps: Tensor, weight: Tensor, kernel: Tensor, b: Tensor) -> Tensor:
        inputs, outputs = KEPT["both"]
        y = submatrix_linear(x, weight, b, inputs, outputs, scale=2.0)
        z = submatrix_conv(maps, kernel, b, inputs, outputs, padding=1)
        return y.square().sum() + z.square().sum()

    arguments = [randn(4, 3), randn(2, 3, 5), randn(5, 7, seed=1), randn(5, 7, 3, seed=2), randn(5, seed=3)]
    for argument in arguments:
        argument.requires_grad_()
    expected = step(*arguments)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(found, expected)
    for a, e in zip(torch.autograd.grad(found, arguments), torch.autograd.grad(expected, arguments), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bernoulli"])
def test_compiled_draws_are_the_eager_ones(exact: bool) -> None:
    torch._dynamo.reset()

    def draw(x: Tensor) -> Tensor:
        return draw_pattern(64, 0.5, exact=exact) + x

    compiled = torch.compile(draw, backend="aot_eager", fullgraph=exact)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = draw(torch.ones(()))
        torch.manual_seed(seed)
        assert torch.equal(compiled(torch.ones(())), expected)
        assert torch.get_rng_state().equal(torch.get_rng_state())


def test_submatrix_alone() -> None:
    weight, b = randn(5, 7).requires_grad_(), randn(5).requires_grad_()
    same, also = submatrix(weight, b, None, None)
    assert same is weight
    assert also is b
    rows, columns = torch.tensor([0, 4]), torch.tensor([2])
    block, short = submatrix(weight, b, rows, columns)
    assert torch.equal(block, weight[rows][:, columns])
    assert short is not None
    assert torch.equal(short, b[rows])
    block, whole = submatrix(weight, b, None, columns)
    assert torch.equal(block, weight[:, columns])
    assert whole is not None
    assert torch.equal(whole, b)
    (block.sum() + whole.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(5, 7, dtype=torch.float64).index_fill(1, columns, 1))
    assert torch.equal(b.grad, torch.ones(5, dtype=torch.float64))
    vector = submatrix(b, None, rows, None)[0]
    assert torch.equal(vector, b[rows])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.tensor([2, 1]), "kept_inputs must be sorted and distinct, from 0 to 6"),
        (torch.tensor([1, 1]), "sorted and distinct"),
        (torch.tensor([-1, 1]), "sorted and distinct"),
        (torch.tensor([1, 7]), "sorted and distinct"),
        (torch.tensor([1.0, 2.0]), "kept_inputs is torch.float32 of shape"),
        (torch.tensor([1, 2], dtype=torch.int32), "int64 vector"),
        (torch.tensor([[1, 2]]), r"of shape \(1, 2\)"),
        (
            torch.tensor([1, 2], device="meta"),
            "on meta; it must be an int64 vector of indices on the weight's device, cpu",
        ),
        (torch.tensor([1, 2, 3]), "has 2 features, but there are 3 kept inputs"),
    ],
    ids=["unsorted", "twice", "negative", "large", "float", "int32", "matrix", "device", "shape"],
)
def test_bad_kept_inputs(kept: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        submatrix_linear(randn(3, 2), randn(5, 7), None, kept)
    with pytest.raises(ValueError, match=message):
        submatrix_conv(randn(3, 2, 4), randn(5, 7, 2), None, kept)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="has 3 features, but there are 7 inputs: pass the compact input"):
        submatrix_linear(randn(2, 3), randn(5, 7))
    with pytest.raises(ValueError, match="kept_outputs must be sorted and distinct, from 0 to 4"):
        submatrix_linear(randn(2, 7), randn(5, 7), None, None, torch.tensor([5]))
    with pytest.raises(ValueError, match=r"a convolution's is \(outputs, inputs, \*kernel\)"):
        submatrix_conv(randn(2, 7), randn(5, 7))


def test_nothing_kept() -> None:
    none = torch.empty(0, dtype=torch.int64)
    weight, b = randn(5, 7).requires_grad_(), randn(5).requires_grad_()
    y = submatrix_linear(randn(3, 0), weight, b, none, None)
    assert torch.equal(y, b.expand(3, 5))
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    y = submatrix_linear(randn(3, 7), weight, b, None, none)
    assert y.shape == (3, 0)
    y.sum().backward()
    assert not weight.grad.any()
