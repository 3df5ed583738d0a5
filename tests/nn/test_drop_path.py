"""DropPath: the branch runs on the kept rows alone, with the results of the masked computation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchlab.nn import BatchNorm1d, DropPath
from batchlab.surgery import initialize, insert_batch_norm


class Watched(nn.Module):
    """A branch that remembers what it got."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach())
        result: Tensor = self.inner(x)
        return result


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)).to(dtype)


def kept_rows(x: Tensor, rows: Tensor) -> list[int]:
    """Which rows of x a branch got, by their values."""
    where = [[i for i in range(len(x)) if torch.equal(x[i], row)] for row in rows]
    assert all(len(found) == 1 for found in where)
    return [found[0] for found in where]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bernoulli"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(13, 6), (10, 4, 6), (9, 2, 3, 6)], ids=str)
def test_equals_the_masked_computation(shape: tuple[int, ...], p: float, exact: bool) -> None:
    torch.manual_seed(0)
    layer = DropPath(Watched(mlp()), p, exact=exact)
    plain = copy.deepcopy(layer.branch.inner)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    inputs = layer.branch.inputs
    kept = kept_rows(x.detach(), inputs[0]) if inputs else []
    scale = 1 / (1 - p)
    if exact:
        assert len(kept) == max(1, round(shape[0] * (1 - p)))
        scale = shape[0] / len(kept)
    mask = torch.zeros(shape[0], *[1] * (len(shape) - 1), dtype=torch.float64)
    mask[kept] = scale
    z = x.detach().clone().requires_grad_()
    expected = z + mask * plain(z)
    (expected * weights).sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-12, atol=1e-12)
    for mine, masked in zip(layer.branch.inner.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, masked.grad, rtol=1e-12, atol=1e-12)
    dropped = [i for i in range(shape[0]) if i not in kept]
    assert torch.equal(y[dropped], x[dropped])


def test_skipped_rows_do_not_matter_not_even_nan() -> None:
    torch.manual_seed(0)
    layer = DropPath(Watched(mlp()), 0.5)
    x = torch.randn(8, 6, dtype=torch.float64)
    torch.manual_seed(1)
    y = layer(x)
    kept = kept_rows(x, layer.branch.inputs[0])
    assert kept == sorted(kept)
    dropped = [i for i in range(8) if i not in kept]
    x[dropped] = float("nan")
    torch.manual_seed(1)
    again = layer(x)
    assert torch.equal(again[kept], y[kept])
    assert again[dropped].isnan().all()


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bernoulli"])
@pytest.mark.parametrize(("rows", "p"), [(1, 0.5), (2, 0.9), (3, 0.4), (16, 0.3)])
def test_is_unbiased_for_every_batch_size(rows: int, p: float, exact: bool) -> None:
    torch.manual_seed(0)
    layer = DropPath(nn.Identity(), p, exact=exact)
    draws = 2000
    x = torch.ones(rows, 1)
    added = torch.stack([layer(x) - x for _ in range(draws)])
    # Exact: k of n rows get n/k, so the variance is n/k - 1; Bernoulli: p/(1-p). Five standard deviations.
    count = max(1, round(rows * (1 - p)))
    variance = rows / count - 1 if exact else p / (1 - p)
    assert (added.mean(0) - 1).abs().max().item() <= 5 * (variance / draws) ** 0.5 + 1e-6
    if exact:
        assert ((added > 0).sum(1) == count).all()
    elif rows > 1:
        shares = (added > 0).double().mean().item()
        assert abs(shares - (1 - p)) < 5 * (p * (1 - p) / draws / rows) ** 0.5


def test_evaluation_and_extreme_rates() -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    branch = mlp()
    state = torch.get_rng_state()
    for p in (0.0, 0.5, 1.0):
        assert torch.equal(DropPath(branch, p).eval()(x), x + branch(x))
    assert torch.equal(DropPath(branch, 0.0)(x), x + branch(x))
    assert torch.equal(DropPath(branch, 1.0)(x), x)
    assert torch.equal(DropPath(branch, 1)(x), x)
    assert torch.equal(DropPath(branch, 0.05)(x), x + branch(x))  # round(5 * 0.95) = 5 of 5
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(DropPath(branch, 0.9)(x[:1]), x[:1] + branch(x[:1]))  # a batch of one keeps its sample
    assert torch.equal(DropPath(branch, 0.9).eval()(x[:1]), x[:1] + branch(x[:1]))
    for exact in (True, False):
        assert DropPath(branch, 0.5, exact=exact)(x[:0]).shape == (0, 6)
    torch.manual_seed(0)
    none = DropPath(Watched(branch), 0.999, exact=False)
    assert torch.equal(none(x), x)
    assert not none.branch.inputs  # it did not run


def test_batch_norm_in_the_branch_sees_the_kept_rows() -> None:
    torch.manual_seed(0)
    norm = BatchNorm1d(6, momentum=1.0)
    layer = DropPath(Watched(norm), 0.5)
    x = torch.randn(12, 6)
    layer(x)
    seen = layer.branch.inputs[0]
    assert seen.shape == (6, 6)
    torch.testing.assert_close(norm.running_mean, seen.mean(0))
    torch.testing.assert_close(norm.running_var, seen.var(0))


def test_same_seed_same_rows_and_a_checkpoint_repeats_them() -> None:
    layer = DropPath(Watched(mlp()), 0.5)
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(layer(x))
    assert torch.equal(*outputs)
    (wanted,) = torch.autograd.grad(outputs[0].sum(), x)
    for reentrant in (True, False):
        torch.manual_seed(3)
        x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close(x.grad, wanted, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    layer = DropPath(mlp(), 0.5)

    def seeded(x: Tensor) -> Any:
        torch.manual_seed(0)
        return layer(x)

    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_layouts_and_autocast(dtype: torch.dtype) -> None:
    conv = DropPath(Watched(nn.Conv2d(6, 6, 3, padding=1)).to(dtype), 0.5)
    x = torch.randn(4, 6, 5, 5).to(dtype).to(memory_format=torch.channels_last)
    y = conv(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert conv.branch.inputs[0].is_contiguous(memory_format=torch.channels_last)
    x3d = torch.randn(4, 6, 2, 3, 5).to(memory_format=torch.channels_last_3d)
    assert DropPath(nn.ReLU())(x3d).is_contiguous(memory_format=torch.channels_last_3d)
    y = conv(x.transpose(2, 3)[:, :, ::2])
    assert y.shape == (4, 6, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        block = DropPath(nn.Linear(6, 6), 0.5)
        assert block(torch.randn(8, 6)).dtype == block.eval()(torch.randn(8, 6)).dtype == torch.float32


def test_repr_copies_and_state() -> None:
    layer = DropPath(nn.Linear(2, 2), 0.25)
    assert repr(layer).startswith("DropPath(\n  p=0.25\n  (branch): Linear")
    assert "p=0.5, exact=False" in repr(DropPath(nn.Identity(), exact=False))
    assert list(layer.state_dict()) == ["branch.weight", "branch.bias"]
    x = torch.randn(8, 2)
    torch.manual_seed(0)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(0)
        assert torch.equal(other(x), expected)


def test_surgery_on_models_with_skipped_branches() -> None:
    branch = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), DropPath(branch, 0.5), nn.Linear(4, 4))
    slopes = {entry.layer: entry.slope for entry in initialize(model).report.entries}
    assert slopes == {"0": 1, "2.branch.0": 1, "2.branch.2": 0, "3": 1}
    insert_batch_norm(model)
    assert len(model) == 5
    assert model(torch.randn(6, 4)).shape == (6, 4)


def test_errors() -> None:
    for p in (-0.1, 1.5, float("nan"), "x", True):
        with pytest.raises(ValueError, match="share of features to drop, from 0 to 1"):
            DropPath(nn.Identity(), p)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"branch is a function; it must be a torch.nn.Module"):
        DropPath(lambda x: x, 0.5)  # type: ignore[arg-type]
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"turned \(\d, 4\) into \(\d, 3\); a residual branch keeps the shape"):
            DropPath(nn.Linear(4, 3)).train(mode)(torch.ones(4, 4))
        with pytest.raises(TypeError, match="the branch returned tuple"):
            DropPath(nn.LSTM(4, 4)).train(mode)(torch.ones(4, 4))
        with pytest.raises(ValueError, match="the input has no dimensions"):
            DropPath(nn.Identity()).train(mode)(torch.ones(()))


@pytest.mark.slow
def test_compiles() -> None:
    torch._dynamo.reset()
    layer = DropPath(mlp(), 0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (8, 12, 20):
        x = torch.randn(rows, 6, dtype=torch.float64)
        torch.manual_seed(0)
        expected = layer(x)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(x), expected)
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))
    bernoulli = DropPath(mlp(), 0.5, exact=False)
    broken = torch.compile(bernoulli, backend="aot_eager")  # the graph breaks where the number of rows is known
    torch.manual_seed(0)
    expected = bernoulli(x)
    torch.manual_seed(0)
    torch.testing.assert_close(broken(x), expected)
