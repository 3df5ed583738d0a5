"""The compiled kernels against the reference in float64, on sizes around the width of a vector register."""

from itertools import product

import pytest
import torch
from torch import Tensor

from batchlab import kernels, reference

K = kernels.submatrix
R = reference.batchwise_dropout

pytestmark = pytest.mark.skipif(not K.available(), reason="no C++ compiler")

WIDTHS = [1, 15, 16, 17, 31, 33, 784]
PATTERNS = ["all-none", "all", "empty", "first", "last", "single", "half", "most"]
DTYPES = [torch.float32, torch.float64]


def pattern(name: str, count: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(count)
    order = torch.randperm(count, generator=generator)
    taken = {
        "all": order,
        "empty": order[:0],
        "first": torch.tensor([0]),
        "last": torch.tensor([count - 1]),
        "single": order[:1],
        "half": order[: (count + 1) // 2],
        "most": order[: max(1, count - 1)],
    }
    return None if name == "all-none" else taken[name].sort().values


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def size(kept: Tensor | None, count: int) -> int:
    return count if kept is None else len(kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [1, 4, 9])
@pytest.mark.parametrize("width", WIDTHS)
def test_gather_and_scatter(width: int, inner: int, dtype: torch.dtype) -> None:
    shape = (7, width) if inner == 1 else (7, width, inner)
    weight = randn(*shape, dtype=dtype)
    for across, down in product(PATTERNS, ["all-none", "empty", "half", "last"]):
        rows, columns = pattern(down, 7), pattern(across, width)
        block = K.gather(weight, rows, columns)
        assert torch.equal(block, R.submatrix(weight, rows, columns))
        assert block.is_contiguous()
        assert torch.equal(K.scatter(block, rows, columns, weight.shape), R.scatter(block, rows, columns, weight.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_enough_for_several_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weight = randn(600, 500, dtype=dtype)
        rows, columns = pattern("half", 600), pattern("half", 500)
        block = K.gather(weight, rows, columns)
        assert torch.equal(block, R.submatrix(weight, rows, columns))
        assert torch.equal(K.scatter(block, rows, columns, weight.shape), R.scatter(block, rows, columns, weight.shape))
        check_step(weight, block * 0.5, None, 1.0, rows, columns, 0.9, 0.1, True)
        x, left = randn(300, 250, dtype=dtype, seed=1), randn(300, 300, dtype=dtype, seed=2) / 10
        check_step(weight, left, x, 1.0, rows, columns, 0.9, 0.1, True)
        y, _ = K.linear_forward(x, weight, None, rows, columns, 1.0, True)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(y, (x @ block.t()).relu(), rtol=tolerance, atol=tolerance)
    finally:
        torch.set_num_threads(before)


def check_step(
    weight: Tensor,
    gradient: Tensor,
    right: Tensor | None,
    scale: float,
    rows: Tensor | None,
    columns: Tensor | None,
    momentum: float,
    decay: float,
    nesterov: bool,
) -> None:
    velocity = randn(*weight.shape, dtype=weight.dtype, seed=3) if momentum else None
    expected_w, expected_v = weight.double().clone(), None if velocity is None else velocity.double().clone()
    whole = gradient.double() if right is None else scale * gradient.double().t() @ right.double()
    matrix = [expected_w, expected_v]
    where = rows, columns
    if weight.ndim == 1:
        matrix = [None if t is None else t.view(1, -1) for t in matrix]
        whole, where = whole.view(1, -1), (None, rows)
    R.momentum_step(*matrix, whole, *where, 0.1, momentum, decay, nesterov)
    old_w, old_v = weight.clone(), None if velocity is None else velocity.clone()
    found = weight.clone()
    K.momentum_step(
        [found], [] if velocity is None else [velocity], [gradient], [right], [scale], [rows], [columns],
        0.1, momentum, decay, nesterov,
    )  # fmt: skip
    tolerance = 1e-5 if weight.dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found.double(), expected_w, rtol=tolerance, atol=tolerance)
    rests = R.scatter(torch.ones_like(R.submatrix(weight, rows, columns)), rows, columns, weight.shape) == 0
    assert torch.equal(found[rests], old_w[rests])
    if velocity is not None:
        torch.testing.assert_close(velocity.double(), expected_v, rtol=tolerance, atol=tolerance)
        assert torch.equal(velocity[rests], old_v[rests])


STEPS = [(0.0, 0.0, False), (0.0, 0.1, False), (0.9, 0.0, False), (0.9, 0.1, False), (0.9, 0.1, True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [1, 4, 9])
@pytest.mark.parametrize("width", WIDTHS)
def test_momentum_step(width: int, inner: int, dtype: torch.dtype) -> None:
    shape = (5, width) if inner == 1 else (5, width, inner)
    weight = randn(*shape, dtype=dtype)
    for number, across in enumerate(PATTERNS):
        rows, columns = pattern(["half", "all-none", "empty"][number % 3], 5), pattern(across, width)
        gradient = R.submatrix(randn(*shape, dtype=dtype, seed=1), rows, columns)
        for step in STEPS:
            check_step(weight, gradient, None, 1.0, rows, columns, *step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_momentum_step_of_a_vector(width: int, dtype: torch.dtype) -> None:
    weight = randn(width, dtype=dtype)
    for name in PATTERNS:
        rows = pattern(name, width)
        check_step(weight, randn(size(rows, width), dtype=dtype, seed=1), None, 1.0, rows, None, 0.9, 0.1, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("width", WIDTHS)
def test_momentum_step_from_factors(width: int, batch: int, dtype: torch.dtype) -> None:
    weight = randn(33, width, dtype=dtype)
    for across, down in product(PATTERNS, ["all-none", "half", "single"]):
        rows, columns = pattern(down, 33), pattern(across, width)
        left = randn(batch, size(rows, 33), dtype=dtype, seed=1)
        right = randn(batch, size(columns, width), dtype=dtype, seed=2)
        check_step(weight, left, right, 1.5, rows, columns, 0.9, 0.1, True)


def test_momentum_step_from_factors_in_tiles() -> None:
    """More rows than one tile has, and a right factor that is not contiguous."""
    weight = randn(700, 1500)
    rows, columns = pattern("most", 700), pattern("most", 1500)
    check_step(weight, randn(4, 699, seed=1), randn(1499, 4, seed=2).t(), 0.5, rows, columns, 0.9, 0.01, False)


def test_several_weights_in_one_call() -> None:
    weights = [randn(4, 20), randn(9), randn(3, 5, 2, 2)]
    velocities = [torch.zeros_like(w) for w in weights]
    gradients = [randn(2, 20), randn(4), randn(3, 2, 2, 2)]
    rows = [torch.tensor([0, 3]), torch.tensor([1, 2, 5, 8]), None]
    columns = [None, None, torch.tensor([0, 4])]
    expected = [(w.clone().view(1, -1) if w.ndim == 1 else w.clone()) for w in weights]
    for w, g, r, c in zip(expected, gradients, rows, columns, strict=True):
        if w.shape[0] == 1:
            r, c, g = None, r, g.view(1, -1)
        R.momentum_step(w, torch.zeros_like(w), g, r, c, 0.1, 0.9, 0.0, False)
    K.momentum_step(weights, velocities, gradients, [None] * 3, [1.0] * 3, rows, columns, 0.1, 0.9, 0.0, False)
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b.view_as(a))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_linear(width: int, dtype: torch.dtype, relu: bool) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    weight, bias = randn(17, width, dtype=dtype), randn(17, dtype=dtype, seed=1)
    for number, (across, down) in enumerate(product(PATTERNS, ["all-none", "empty", "half", "last"])):
        rows, columns = pattern(down, 17), pattern(across, width)
        b = bias if number % 2 else None
        x = randn(6, size(columns, width), dtype=dtype, seed=2)
        y, block = K.linear_forward(x, weight, b, rows, columns, 1.5, relu)
        assert torch.equal(block, R.submatrix(weight, rows, columns))
        exact_x, exact_w = x.double().requires_grad_(), block.double().requires_grad_()
        exact_b = (torch.zeros(17) if b is None else b).double()
        exact_b = (exact_b if rows is None else exact_b[rows]).requires_grad_()
        exact = 1.5 * exact_x @ exact_w.t() + exact_b
        exact = exact.relu() if relu else exact
        torch.testing.assert_close(y.double(), exact.detach(), rtol=tolerance, atol=tolerance)
        g = randn(*y.shape, dtype=dtype, seed=3)
        found = K.linear_backward(g, x, block, y if relu else None, 1.5, (True, True, True))
        expected = torch.autograd.grad(exact, (exact_x, exact_w, exact_b), g.double())
        for a, e in zip(found, expected, strict=False):
            torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)
        behind = torch.where(y <= 0, 0, g) if relu else g
        assert torch.equal(found[3], behind)
        nothing = K.linear_backward(g, x, block, y if relu else None, 1.5, (False, False, False))
        assert [t.numel() for t in nothing[:3]] == [0, 0, 0]


def test_linear_without_samples() -> None:
    weight, kept = randn(4, 6), torch.tensor([0, 3])
    y, block = K.linear_forward(torch.empty(0, 2), weight, torch.ones(4), None, kept, 1.0, True)
    assert y.shape == (0, 4)
    found = K.linear_backward(torch.empty(0, 4), torch.empty(0, 2), block, y, 1.0, (True, True, True))
    assert [tuple(t.shape) for t in found] == [(0, 2), (4, 2), (4,), (0, 4)]
    assert not found[1].any()
    assert not found[2].any()


BAD = {
    "unsorted": [2, 1],
    "twice": [1, 1],
    "negative": [-1, 2],
    "too-large": [0, 5],
    "far-too-large": [0, 2**40],
}


@pytest.mark.parametrize("which", ["rows", "columns"])
@pytest.mark.parametrize("name", BAD)
def test_bad_indices_raise_and_change_nothing(name: str, which: str) -> None:
    bad = torch.tensor(BAD[name])
    rows, columns = (bad, None) if which == "rows" else (None, bad)
    weight, velocity = randn(5, 5), randn(5, 5, seed=1)
    before = weight.clone(), velocity.clone()
    block = randn(2, 5) if which == "rows" else randn(5, 2)
    x = randn(3, 5 if which == "rows" else 2)
    with pytest.raises(RuntimeError, match="sorted, distinct and below 5"):
        K.gather(weight, rows, columns)
    with pytest.raises(RuntimeError, match="sorted, distinct and below 5"):
        K.scatter(block, rows, columns, weight.shape)
    with pytest.raises(RuntimeError, match="sorted, distinct and below 5"):
        K.linear_forward(x, weight, None, rows, columns, 1.0, False)
    with pytest.raises(RuntimeError, match="sorted, distinct and below 5"):
        K.momentum_step([weight], [velocity], [block], [None], [1.0], [rows], [columns], 0.1, 0.9, 0.0, False)
    assert torch.equal(weight, before[0])
    assert torch.equal(velocity, before[1])


def test_wrong_kinds_of_tensors_raise() -> None:
    weight = randn(5, 5)
    for kept in (torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([0], dtype=torch.int32), torch.arange(4)[::2]):
        with pytest.raises(RuntimeError, match="contiguous int64 vector"):
            K.gather(weight, kept, None)
    for other in (weight.t(), randn(5)):
        with pytest.raises(RuntimeError, match="contiguous, with rows and columns"):
            K.gather(other, None, torch.tensor([0]))
    with pytest.raises(RuntimeError, match="the block is contiguous, with 10 elements; got 9"):
        torch.ops.batchlab_submatrix.scatter.default(randn(9), torch.tensor([0, 1]), None, 5, 5, 1)
    with pytest.raises(RuntimeError, match="of the weight's dtype"):
        K.momentum_step([weight], [], [randn(5, 5).double()], [None], [1.0], [None], [None], 0.1, 0.0, 0.0, False)
    with pytest.raises(RuntimeError, match="factors"):
        K.momentum_step([weight], [], [randn(2, 4)], [randn(2, 5)], [1.0], [None], [None], 0.1, 0.0, 0.0, False)
    with pytest.raises(RuntimeError, match="linear layer takes"):
        K.linear_forward(randn(2, 5), weight, None, None, torch.tensor([0]), 1.0, False)
    with pytest.raises(RuntimeError):
        K.linear_forward(randn(2, 5).double(), weight, None, None, None, 1.0, False)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        K.gather(weight.half(), torch.tensor([0]), None)
    assert not K.serves(weight.half())
    assert not K.serves(weight.t())
    assert not K.serves(weight.to("meta"))
    assert K.serves(weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_kept_does_not_leak_in(dtype: torch.dtype, bad: float) -> None:
    rows, columns = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 16, 18, 36])
    weight = torch.full((6, 37), bad, dtype=dtype)
    clean = randn(2, 6, dtype=dtype)
    weight[rows[:, None], columns] = clean
    assert torch.equal(K.gather(weight, rows, columns), clean)
    bias = torch.full((6,), bad, dtype=dtype)
    bias[rows] = 1
    y, _ = K.linear_forward(randn(3, 6, dtype=dtype), weight, bias, rows, columns, 1.0, True)
    assert y.isfinite().all()
    velocity = weight.clone()
    K.momentum_step([weight], [velocity], [clean], [None], [1.0], [rows], [columns], 0.1, 0.9, 0.1, True)
    assert int(weight.isfinite().sum()) == int(velocity.isfinite().sum()) == 12
    left, right = randn(3, 2, dtype=dtype), randn(3, 6, dtype=dtype)
    K.momentum_step([weight], [velocity], [left], [right], [1.0], [rows], [columns], 0.1, 0.9, 0.1, True)
    assert int(weight.isfinite().sum()) == int(velocity.isfinite().sum()) == 12


def test_memory_with_nan_in_it_is_not_read() -> None:
    """Blocks come from memory that was used before: fill it with NaN first."""
    for _ in range(3):
        freed = [K.gather(torch.full((64, 64), float("nan")), torch.arange(n), None) for n in range(1, 40)]
        del freed
        kept = torch.arange(0, 64, 2)
        weight, x = randn(64, 64), randn(8, 32)
        y, block = K.linear_forward(x, weight, None, kept, kept, 1.0, False)
        found = K.linear_backward(torch.ones_like(y), x, block, None, 1.0, (True, True, True))
        assert all(t.isfinite().all() for t in (y, *found))
        assert K.scatter(block, kept, kept, weight.shape).isfinite().all()
        K.momentum_step([weight], [], [torch.ones(8, 32)], [x], [1.0], [kept], [kept], 0.1, 0.0, 0.0, False)
        assert weight.isfinite().all()


def test_nan_passes_through_relu_as_in_torch() -> None:
    weight = torch.eye(3)
    x = torch.tensor([[float("nan"), -1.0, 2.0], [float("-inf"), float("inf"), -0.0]])
    y, block = K.linear_forward(x[:1], weight, None, None, None, 1.0, True)
    assert y.isnan().all()  # NaN times zero, as in a dense product
    diagonal = torch.tensor([[float("nan")], [-1.0], [2.0], [0.0], [float("inf")]])
    y, block = K.linear_forward(diagonal, torch.ones(1, 1), None, None, None, 1.0, True)
    given = torch.arange(1.0, 6.0).view(5, 1)
    _, _, _, behind = K.linear_backward(given, diagonal, block, y, 1.0, (False, False, False))
    x = diagonal.clone().requires_grad_()
    expected = x.relu()
    (gradient,) = torch.autograd.grad(expected, x, given)
    torch.testing.assert_close(y, expected.detach(), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(behind, gradient, rtol=0, atol=0)


def test_sorted_first() -> None:
    for n in (0, 1, 15, 16, 17, 784):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        for count in {0, n // 2, max(0, n - 1), n}:
            assert torch.equal(K.sorted_first(order, count), order[:count].sort().values)
    with pytest.raises(RuntimeError, match="at least count entries"):
        K.sorted_first(torch.randperm(3), 4)
    with pytest.raises(RuntimeError, match="at least count entries"):
        K.sorted_first(torch.randperm(3), -1)
    with pytest.raises(RuntimeError, match="from 0 to 2"):
        K.sorted_first(torch.tensor([0, 3, 1]), 2)
    with pytest.raises(RuntimeError, match="every entry once"):
        K.sorted_first(torch.tensor([1, 1, 2]), 2)


def test_released_memory_leaves_tensors_in_use() -> None:
    block = K.gather(randn(300, 300), torch.arange(200), None)
    expected = block.clone()
    del expected  # waits, or not
    other = K.gather(randn(300, 300), torch.arange(250), None)
    expected = other.clone()
    del block
    assert K.release_memory() >= 200 * 300 * 4
    assert K.release_memory() == 0
    assert torch.equal(other, expected)
