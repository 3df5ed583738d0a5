"""Initial weights: the variance that goes in comes out, forward and backward, whatever the layer is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from batchlab.nn import init

# Layers, inputs for them, and how many positions at the borders do not see the whole kernel. Each has at least 2,000
# weights and 10,000 outputs: a measured variance is then off by less than 5% (the weights' own sum of squares by
# sqrt(2/2000) = 3%), so 20% is four standard deviations. Wrong fans, groups, strides or dropouts are factors of two and
# more; the slope of 0.25 alone is 6%, and is seen over many layers in tests/surgery/test_initialization.py.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(300, 200, bias=False), (400, 300), 0),
    "linear-wide": (lambda: nn.Linear(40, 900, bias=False), (400, 40), 0),
    "conv1d-dilated": (lambda: nn.Conv1d(60, 90, 3, dilation=2, bias=False), (30, 60, 40), 4),
    "conv2d": (lambda: nn.Conv2d(40, 80, 3, bias=False), (20, 40, 16, 16), 2),
    "conv2d-grouped": (lambda: nn.Conv2d(80, 160, 3, groups=4, bias=False), (10, 80, 16, 16), 2),
    "conv2d-depthwise": (lambda: nn.Conv2d(400, 400, 3, groups=400, bias=False), (10, 400, 12, 12), 2),
    "conv2d-stride": (lambda: nn.Conv2d(60, 90, 4, stride=2, bias=False), (10, 60, 24, 24), 4),
    "conv3d": (lambda: nn.Conv3d(20, 30, 2, bias=False), (10, 20, 8, 8, 8), 1),
    "transposed": (lambda: nn.ConvTranspose2d(60, 40, 4, stride=2, bias=False), (10, 60, 12, 12), 4),
    "transposed-grouped": (lambda: nn.ConvTranspose2d(80, 40, 3, groups=4, bias=False), (10, 80, 14, 14), 2),
}


def options(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {}
    return {
        "groups": layer.groups,
        "stride": layer.stride,
        "transposed": isinstance(layer, nn.modules.conv._ConvTransposeNd),
    }


def inner(x: Tensor, border: int) -> Tensor:
    spatial = (slice(border, -border),) * (x.ndim - 2) if border else ()
    return x[(slice(None), slice(None), *spatial)]


def rectified(z: Tensor, slope: float) -> Tensor:
    return torch.where(z > 0, z, slope * z)


@pytest.mark.parametrize("fill", [init.he_normal_, init.he_uniform_], ids=["normal", "uniform"])
@pytest.mark.parametrize(("slope", "keep"), [(0.0, 1.0), (0.25, 1.0), (0.5, 0.5), (1.0, 0.8)])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_variance(name: str, slope: float, keep: float, fill: Any) -> None:
    torch.manual_seed(0)
    make, shape, border = LAYERS[name]
    layer = make()
    fill(layer.weight, slope, keep=keep, **options(layer))
    x = rectified(torch.randn(shape), slope) * (torch.rand(shape) < keep) / keep
    with torch.no_grad():
        y = inner(layer(x), border)
    assert abs(y.square().mean().item() - 1) < 0.2


@pytest.mark.parametrize("fill", [init.he_normal_, init.he_uniform_], ids=["normal", "uniform"])
@pytest.mark.parametrize(("slope", "keep"), [(0.0, 1.0), (0.25, 1.0), (0.5, 0.5), (1.0, 0.8)])
@pytest.mark.parametrize("name", LAYERS)
def test_backward_variance(name: str, slope: float, keep: float, fill: Any) -> None:
    torch.manual_seed(0)
    make, shape, border = LAYERS[name]
    layer = make()
    fill(layer.weight, slope, mode="backward", keep=keep, **options(layer))
    x = torch.randn(shape, requires_grad=True)
    y = rectified(layer(x * (torch.rand(shape) < keep) / keep), slope)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    assert abs(inner(x.grad, border).square().mean().item() - 1) < 0.2


def test_torch_where_torch_counts_right() -> None:
    for shape in [(30, 20), (30, 20, 3), (4, 5, 2, 3)]:
        for mode, fan in (("forward", "fan_in"), ("backward", "fan_out")):
            for fill, theirs in (
                (init.he_normal_, nn.init.kaiming_normal_),
                (init.he_uniform_, nn.init.kaiming_uniform_),
            ):
                torch.manual_seed(1)
                mine = fill(torch.empty(shape), 0.3, mode=mode)
                torch.manual_seed(1)
                torch.testing.assert_close(mine, theirs(torch.empty(shape), 0.3, fan))  # type: ignore[arg-type]


def test_torch_does_not_count_groups_backward_nor_transposition() -> None:
    shape = (64, 8, 3, 3)  # of Conv2d(32, 64, 3, groups=4), or of ConvTranspose2d(64, 8, 3)

    def ratio(mode: str, fan: Any, **given: Any) -> float:
        results = []
        for fill in (lambda w: init.he_normal_(w, mode=mode, **given), lambda w: nn.init.kaiming_normal_(w, mode=fan)):
            torch.manual_seed(0)
            results.append(fill(torch.empty(shape)))
        return float((results[0] / results[1]).square().mean())

    assert ratio("forward", "fan_in", groups=4) == pytest.approx(1)
    assert ratio("backward", "fan_out", groups=4) == pytest.approx(4)
    assert ratio("forward", "fan_out", transposed=True) == pytest.approx(1)
    assert ratio("backward", "fan_in", transposed=True) == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(
    groups=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    transposed=st.booleans(),
    mode=st.sampled_from(["forward", "backward"]),
)
def test_terms_are_those_that_torch_sums(
    groups: int, sizes: tuple[int, int], kernel: int, stride: int, transposed: bool, mode: str
) -> None:
    """All weights and inputs one: an output is the number of its terms. Averaged over whole periods of the stride."""
    cls = nn.ConvTranspose1d if transposed else nn.Conv1d
    layer = cls(groups * sizes[0], groups * sizes[1], kernel, stride=stride, groups=groups, bias=False).double()
    nn.init.ones_(layer.weight)
    x = torch.ones(1, groups * sizes[0], 24, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    counted = (y.detach() if mode == "forward" else x.grad)[..., 6:18].mean().item()
    # He's variance is 2/n at slope 0, so n can be read off the uniform bound: bound^2 = 3 * 2 / n.
    wide = torch.empty(1).uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    filled = init.he_uniform_(
        torch.empty_like(layer.weight, dtype=torch.float32),
        mode=mode,
        generator=torch.Generator().manual_seed(3),
        **options(layer),
    )
    bound = (filled.flatten()[0] / wide).item()
    assert 6 / bound**2 == pytest.approx(counted, rel=1e-4)


def test_returns_the_tensor_and_takes_a_generator() -> None:
    for fill in (init.he_normal_, init.he_uniform_):
        weight = nn.Parameter(torch.empty(20, 30))
        assert fill(weight, generator=torch.Generator().manual_seed(4)) is weight
        assert weight.requires_grad
        assert weight.grad_fn is None
        state = torch.get_rng_state()
        again = fill(torch.empty(20, 30), generator=torch.Generator().manual_seed(4))
        assert torch.equal(weight, again)
        assert torch.equal(torch.get_rng_state(), state)
        strided = torch.empty(30, 20).T
        fill(strided)
        assert abs(strided.std().item() / (2 / 30) ** 0.5 - 1) < 0.2
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert fill(torch.empty(20, 30, dtype=dtype)).isfinite().all()
        assert fill(torch.empty(0, 3)).shape == (0, 3)
        assert fill(torch.empty(3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "fan_in"}, "mode is 'fan_in'; allowed are 'forward'"),
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"negative_slope": float("nan")}, "negative_slope is nan"),
        ({"groups": 3}, "groups is 3, which does not divide"),
        ({"groups": 0}, "groups is 0"),
        ({"stride": (2, 2)}, r"stride is \(2, 2\)"),
        ({"stride": 0}, "stride is 0"),
    ],
)
def test_errors_leave_the_tensor(given: dict[str, Any], message: str) -> None:
    for fill in (init.he_normal_, init.he_uniform_):
        weight = torch.ones(4, 2, 3)
        with pytest.raises(ValueError, match=message):
            fill(weight, **given)
        assert torch.equal(weight, torch.ones(4, 2, 3))
        with pytest.raises(ValueError, match=r"the tensor has shape \(5,\)"):
            fill(torch.ones(5))
        with pytest.raises(TypeError, match=r"dtype torch.int64"):
            fill(torch.ones(4, 4, dtype=torch.int64))
