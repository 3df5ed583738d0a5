"""Dropout with shared axes, Gaussian and uniform noise: torch's where torch has it, the stated moments elsewhere."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchlab.nn import BatchwiseDropout, Dropout, GaussianDropout, UniformDropout

NOISY: dict[str, Callable[..., nn.Module]] = {
    "independent": Dropout,
    "shared": lambda *args, **options: Dropout(*args, share=(0, -1), **options),
    "gaussian": GaussianDropout,
    "uniform": UniformDropout,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("share", [None, ()])
def test_without_shared_axes_it_is_torch_bit_for_bit(share: Any, p: float, dtype: torch.dtype) -> None:
    mine, theirs = Dropout(p, share=share), nn.Dropout(p)
    assert isinstance(mine, nn.Dropout)
    for mode in (True, False):
        results = []
        for layer in (mine.train(mode), theirs.train(mode)):
            torch.manual_seed(0)
            x = torch.ones(7, 9, dtype=dtype).mul_(1.7).requires_grad_()
            y = layer(x)
            y.sum().backward()
            results.append((y, x.grad, torch.get_rng_state()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    theirs.load_state_dict(mine.state_dict(), strict=True)
    mine.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_shared_spatial_axes_are_torch_feature_dropout(spatial: int) -> None:
    theirs = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[spatial - 1](0.4)
    mine = Dropout(0.4, share=tuple(range(2, 2 + spatial)))
    results = []
    for layer in (mine, theirs):
        torch.manual_seed(3)
        x = torch.arange(1.0, 1 + 6 * 5 * 3**spatial).view(6, 5, *[3] * spatial).requires_grad_()
        y = layer(x)
        y.sum().backward()
        results.append((y, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


SUBSETS = [dims for size in range(1, 4) for dims in itertools.combinations(range(3), size)]


@pytest.mark.parametrize("share", [*SUBSETS, 0, -1, (0, -3), (-1, 1)], ids=str)
def test_one_mask_along_the_shared_axes_and_independent_ones_elsewhere(share: int | tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, dims = Dropout(0.5, share=share), {dim % 3 for dim in ([share] if isinstance(share, int) else share)}
    draws = 1500
    masks = torch.stack([layer(torch.ones(2, 2, 2)) / 2 for _ in range(draws)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    signs = (2 * masks - 1).flatten(1)
    agreement = signs.T @ signs / draws  # of each entry with each, over draws
    for first, second in itertools.product(itertools.product(range(2), repeat=3), repeat=2):
        together = all(a == b or dim in dims for dim, (a, b) in enumerate(zip(first, second, strict=True)))
        got = agreement[first[0] * 4 + first[1] * 2 + first[2], second[0] * 4 + second[1] * 2 + second[2]].item()
        # A mean of 1500 independent signs has standard deviation 0.026; five of them.
        assert got == 1 if together else abs(got) < 5 / math.sqrt(draws)


def test_a_batchwise_mask_is_that_of_batchwise_dropout() -> None:
    torch.manual_seed(0)
    y = Dropout(0.5, share=0)(torch.ones(4, 50))
    other = BatchwiseDropout(0.5, exact=False)(torch.ones(4, 50))
    for z in (y, other):
        assert torch.equal(z, z[:1].expand_as(z))
        assert set(z.unique().tolist()) == {0.0, 2.0}


def gaussian_cdf(p: float) -> Callable[[float], float]:
    return lambda value: 0.5 * (1 + math.erf((value - 1) / math.sqrt(2 * p / (1 - p))))


# Layer; variance and fourth central moment of its noise, by hand. A Bernoulli m/(1-p) is 1/(1-p) with probability
# 1-p: fourth moment (1-p) (p/(1-p))^4 + p.
MOMENTS: list[tuple[nn.Module, float, float]] = [
    (Dropout(0.2), 0.25, 0.8 * 0.25**4 + 0.2),
    (Dropout(0.5), 1.0, 1.0),
    (GaussianDropout(0.2), 0.25, 3 * 0.25**2),
    (GaussianDropout(0.75), 3.0, 3 * 9.0),
    (UniformDropout(0.1), 0.01 / 3, 0.0001 / 5),
    (UniformDropout(1.0), 1 / 3, 1 / 5),
]


@pytest.mark.parametrize(("layer", "variance", "fourth"), MOMENTS, ids=lambda value: str(value))
def test_moments(layer: nn.Module, variance: float, fourth: float) -> None:
    torch.manual_seed(0)
    draws = 200_000
    noise = layer(torch.full((draws,), 2.0, dtype=torch.float64)) / 2
    assert abs(noise.mean().item() - 1) < 5 * math.sqrt(variance / draws)
    spread = (noise - 1).square().mean().item()
    # 1e-9 more for variances of the variance that are zero: p = 0.5.
    assert abs(spread - variance) < 5 * math.sqrt((fourth - variance**2) / draws) + 1e-9


@pytest.mark.parametrize(
    ("layer", "cdf"),
    [
        (GaussianDropout(0.4), gaussian_cdf(0.4)),
        (UniformDropout(0.3), lambda value: (value - 0.7) / 0.6),
    ],
    ids=["gaussian", "uniform"],
)
def test_distribution(layer: nn.Module, cdf: Callable[[float], float]) -> None:
    torch.manual_seed(0)
    values = sorted(layer(torch.ones(5000, dtype=torch.float64)).tolist())
    distance = max(abs(cdf(value) - (i + 0.5) / 5000) for i, value in enumerate(values))
    assert distance < 1.95 / math.sqrt(5000)  # Kolmogorov and Smirnov's bound at one in a thousand


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_to_do_is_the_input_itself(name: str, inplace: bool) -> None:
    x = torch.randn(4, 3, 5)
    state = torch.get_rng_state()
    assert NOISY[name](0.3, inplace).eval()(x) is x
    assert NOISY[name](0.0, inplace)(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    for shape in [(0, 3), (3, 0, 2)]:
        assert NOISY[name](0.3, inplace)(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("share", [None, 0, (1, 2)])
def test_everything_dropped_is_zero_with_zero_gradient(share: Any) -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    y = Dropout(1.0, share=share)(x)
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert not x.grad.any()


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def strided(x: Tensor) -> Tensor:
    return x.transpose(0, 2)


def sliced(x: Tensor) -> Tensor:
    return x[:, :, ::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [channels_last, strided, sliced])
@pytest.mark.parametrize("name", NOISY)
def test_dtype_layout_gradient_and_in_place(name: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    base = torch.randn(4, 6, 4, 5).to(dtype)
    x = layout(base).detach().requires_grad_()
    torch.manual_seed(1)
    y = NOISY[name](0.5)(x)
    assert y.dtype == dtype
    assert y.stride() == x.stride() or layout is sliced
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x, y)  # the gradient is the noise
    before = y.detach().clone()
    torch.manual_seed(1)
    assert torch.equal(NOISY[name](0.5)(x), before)
    leaf = layout(base).detach().requires_grad_()
    copied = leaf * 1
    torch.manual_seed(1)
    written = NOISY[name](0.5, True)(copied)
    assert written is copied
    assert torch.equal(written, before)
    written.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, x.grad)
    with pytest.raises(RuntimeError, match="in-place"):
        NOISY[name](0.5, True)(leaf)


@pytest.mark.parametrize("name", NOISY)
def test_gradcheck_checkpoint_and_vmap(name: str) -> None:
    layer = NOISY[name](0.4)

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return layer(x)

    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)
    torch.manual_seed(2)
    expected = layer(x.sin())
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    torch.manual_seed(2)
    y = checkpoint(lambda z: layer(z.sin()), x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, wanted)
    many = torch.func.vmap(layer, randomness="different")(torch.ones(6, 3, 20, 2))
    assert len(many.flatten(1).unique(dim=0)) == 6
    same = torch.func.vmap(layer, randomness="same")(torch.ones(6, 3, 20, 2))
    assert len(same.flatten(1).unique(dim=0)) == 1


def test_repr_copies_and_no_state() -> None:
    layers = {
        "Dropout(p=0.5, inplace=False)": Dropout(),
        "Dropout(p=0.2, inplace=True, share=(2, -1))": Dropout(0.2, True, share=[2, -1]),
        "Dropout(p=0.5, inplace=False, share=(0,))": Dropout(share=0),
        "GaussianDropout(p=0.5, inplace=False)": GaussianDropout(),
        "UniformDropout(beta=0.1, inplace=False)": UniformDropout(),
    }
    for words, layer in layers.items():
        assert repr(layer) == words
        assert not layer.state_dict()
        layer.to(torch.float16).to("meta")
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)]
        torch.manual_seed(0)
        expected = layer(torch.ones(3, 4, 5))
        for other in others:
            torch.manual_seed(0)
            assert torch.equal(other(torch.ones(3, 4, 5)), expected)
            assert repr(other) == words


def test_errors() -> None:
    for make in (Dropout, GaussianDropout, UniformDropout):
        for wrong in (-0.1, 1.5, float("nan"), "x", None, True):
            with pytest.raises(ValueError, match="from"):
                make(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="infinite variance"):
        GaussianDropout(1.0)
    for share in ("ab", (0.5,), (True,)):
        with pytest.raises(TypeError, match="share is"):
            Dropout(share=share)  # type: ignore[arg-type]
    for share in (2, -3, (0, 5)):
        for mode in (True, False):  # a mistake shows in evaluation too
            with pytest.raises(ValueError, match=r"share is .* the input has shape \(4, 3\), without a dimension"):
                Dropout(share=share).train(mode)(torch.zeros(4, 3))
    for layer in (Dropout(share=0), GaussianDropout(), UniformDropout()):
        with pytest.raises(TypeError, match=r"the input has dtype torch.int64"):
            layer(torch.ones(3, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISY)
def test_compiles(name: str) -> None:
    torch._dynamo.reset()
    layer = NOISY[name](0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.full((8, 50, 4), 2.0, requires_grad=True)
    torch.manual_seed(0)
    y = compiled(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * 2, y.detach())
    assert not torch.equal(compiled(x), y)
    if name == "shared":
        assert torch.equal(y, y[:1, :, :1].expand_as(y))
    layer.eval()
    assert torch.equal(compiled(x), x)
