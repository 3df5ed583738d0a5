"""The chain on kept rows and columns against the same modules with masks, over random architectures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import batchlab.nn as ours
from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from tests.nn.submatrix_chains import CHAINS, compare, compare_training, convnet, hooked, inputs, mlp

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.LeakyReLU(0.2),
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.Softplus,
    nn.PReLU,
    nn.Identity,
    lambda: nn.Hardtanh(0.1, 1.0),
    lambda: nn.Hardtanh(-1.0, 1.0),
]


RATES = [0.0, 0.2, 0.5, 0.5, 0.5, 0.9, 0.99, 1.0]


def dropout(draw: Any, dim: int = 1) -> BatchwiseDropout:
    return BatchwiseDropout(draw(st.sampled_from(RATES)), exact=draw(st.booleans()), dim=dim)


def batch_norm(draw: Any, features: int, spatial: int) -> nn.Module:
    library = draw(st.sampled_from([nn, ours]))
    options = draw(st.sampled_from([{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}]))
    layer = getattr(library, f"BatchNorm{max(spatial, 1)}d")(features, eps=0.1, **options)
    if layer.weight is not None:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    if draw(st.integers(0, 5)) == 0:
        layer.eval()
    return layer


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


@st.composite
def vectors(draw: Any, features: int | None = None, most: int = 8) -> tuple[list[nn.Module], tuple[int, ...]]:
    start = features = features or draw(st.sampled_from([1, 3, 8, 17]))
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(2, most))):
        kind = draw(
            st.sampled_from(["linear"] * 4 + ["dropout"] * 4 + ["act"] * 3 + ["bn", "prelu", "other", "nested"])
        )
        if kind == "linear":
            wider = draw(st.sampled_from([1, 2, 5, 16, 19]))
            modules.append(randomized(nn.Linear(features, wider, bias=draw(st.booleans()))))
            features = wider
            if draw(st.integers(0, 9)) == 0:
                hooked(modules[-1])
        elif kind == "dropout":
            modules.append(dropout(draw, draw(st.sampled_from([1, -1]))))
        elif kind == "act":
            modules.append(draw(st.sampled_from(ACTIVATIONS))())
        elif kind == "prelu":
            modules.append(randomized(nn.PReLU(features)))
        elif kind == "bn":
            modules.append(batch_norm(draw, features, 0))
        elif kind == "nested":
            inner, (_, features) = draw(vectors(features, 3))
            container = draw(st.sampled_from([nn.Sequential, SubmatrixSequential]))
            modules.append(container(*inner))
        else:
            modules.append(
                draw(st.sampled_from([nn.Softmax(1), nn.LayerNorm(features), nn.Flatten(), hooked(nn.ReLU())]))
            )
    return modules, (start, features)


@st.composite
def maps(draw: Any) -> tuple[list[nn.Module], tuple[int, ...]]:
    spatial = draw(st.sampled_from([1, 2, 2, 3]))
    size = 9 if spatial < 3 else 6
    start = channels = draw(st.sampled_from([1, 2, 4]))
    sizes = [size] * spatial
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 8))):
        kind = draw(
            st.sampled_from(["conv"] * 4 + ["dropout"] * 4 + ["act"] * 3 + ["bn", "bn", "prelu", "pool", "pool"])
        )
        if kind == "conv":
            wider = draw(st.sampled_from([2, 4, 6]))
            grouped = draw(st.integers(0, 5)) == 0 and channels % 2 == 0
            kernel = min(draw(st.integers(1, 3)), sizes[0])
            module = getattr(nn, f"Conv{spatial}d")(
                channels,
                wider,
                kernel,
                padding=draw(st.sampled_from(["same", 0])),
                bias=draw(st.booleans()),
                groups=2 if grouped else 1,
                padding_mode=draw(st.sampled_from(["zeros", "zeros", "replicate"])),
            )
            modules.append(randomized(module))
            channels = wider
            if module.padding != "same":
                sizes = [s - kernel + 1 for s in sizes]
        elif kind == "dropout":
            modules.append(dropout(draw, draw(st.sampled_from([1, 1, 1, -1 - spatial, -1]))))
        elif kind == "act":
            modules.append(draw(st.sampled_from(ACTIVATIONS))())
        elif kind == "prelu":
            modules.append(randomized(nn.PReLU(channels)))
        elif kind == "bn":
            modules.append(batch_norm(draw, channels, spatial))
        elif sizes[0] >= 2:
            name = draw(st.sampled_from(["MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"]))
            modules.append(getattr(nn, f"{name}{spatial}d")(2))
            sizes = [2 if name.startswith("Adaptive") else s // 2 for s in sizes]
    if draw(st.booleans()):
        modules.append(nn.Flatten())
        features = channels
        for s in sizes:
            features *= s
        tail, _ = draw(vectors(features, 5))
        modules += tail
    return modules, (start, *[size] * spatial)


@st.composite
def sequences(draw: Any) -> tuple[list[nn.Module], tuple[int, ...]]:
    start = features = draw(st.sampled_from([2, 6]))
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 8))):
        kind = draw(st.sampled_from(["linear"] * 4 + ["dropout"] * 4 + ["act"] * 3 + ["norm", "prelu", "bn", "pool"]))
        if kind == "linear":
            wider = draw(st.sampled_from([2, 6, 16]))
            modules.append(randomized(nn.Linear(features, wider)))
            features = wider
        elif kind == "dropout":
            modules.append(dropout(draw, draw(st.sampled_from([-1, -1, 2, 1]))))
        elif kind == "act":
            modules.append(draw(st.sampled_from(ACTIVATIONS))())
        elif kind == "norm":
            modules.append(nn.LayerNorm(features))
        elif kind == "prelu":
            modules.append(randomized(nn.PReLU(5)))
        elif kind == "bn":
            modules.append(batch_norm(draw, 5, 1))
        elif features % 2 == 0 and features > 2:
            modules.append(nn.MaxPool1d(2))  # over features: mixes what a dropout left out
            features //= 2
    return modules, (5, start)


def without_in_place_on_leaf(modules: list[nn.Module]) -> list[nn.Module]:
    """An in-place activation may change neither the input nor what its neighbour remembers; torch refuses it too."""
    for index, module in enumerate(modules):
        inplace = getattr(module, "inplace", False)
        if inplace and (index == 0 or not isinstance(modules[index - 1], (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))):
            module.inplace = False
        if isinstance(module, nn.Sequential):
            without_in_place_on_leaf(list(module))
    return modules


SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@SETTINGS
@given(st.data())
def test_vectors_equal_masks(data: Any) -> None:
    torch.manual_seed(0)
    modules, (features, _) = data.draw(vectors())
    modules = [m.double() for m in without_in_place_on_leaf(modules)]
    compare(modules, inputs((features,)))
    compare_training(modules, inputs((features,)))


@SETTINGS
@given(st.data())
def test_maps_equal_masks(data: Any) -> None:
    torch.manual_seed(0)
    modules, shape = data.draw(maps())
    modules = [m.double() for m in without_in_place_on_leaf(modules)]
    compare(modules, inputs(shape), seeds=1)
    compare_training(modules, inputs(shape))


@SETTINGS
@given(st.data())
def test_sequences_equal_masks(data: Any) -> None:
    torch.manual_seed(0)
    modules, shape = data.draw(sequences())
    modules = [m.double() for m in without_in_place_on_leaf(modules)]
    compare(modules, inputs(shape))
    compare_training(modules, inputs(shape))


# Named chains.


TOLERANCES = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 0.15}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CHAINS)
def test_dtypes(name: str, dtype: str) -> None:
    make, shape = CHAINS[name]
    cast = getattr(torch, dtype)
    compare([m.to(cast) for m in make()], inputs(shape, 16).to(cast), TOLERANCES[dtype])


@pytest.mark.parametrize("p", [0.0, 0.01, 0.5, 0.97, 0.99, 1.0])
@pytest.mark.parametrize("exact", [True, False])
def test_rates_from_none_to_all(exact: bool, p: float) -> None:
    modules = [m.double() for m in mlp(p, exact)]
    compare(modules, inputs((12,)), seeds=4)
    compare_training(modules, inputs((12,)))
    modules = [m.double() for m in convnet()]
    for module in modules:
        if isinstance(module, BatchwiseDropout):
            module.p, module.exact = p, exact
    compare(modules, inputs((3, 8, 8)), seeds=4)
    compare_training(modules, inputs((3, 8, 8)))


@pytest.mark.parametrize("name", CHAINS)
def test_batch_of_one(name: str) -> None:
    make, shape = CHAINS[name]
    modules = [m.double() for m in make() if not isinstance(m, nn.BatchNorm1d)]
    compare(modules, inputs(shape, 1))


def test_empty_batch() -> None:
    modules = [m.double() for m in mlp()]
    compare(modules, inputs((12,), 0))


@pytest.mark.parametrize("where", ["input", "model", "both"])
def test_channels_last(where: str) -> None:
    modules = [m.double() for m in convnet()]
    x = inputs((3, 8, 8))
    if where != "model":
        x = x.contiguous(memory_format=torch.channels_last)
    if where != "input":
        modules = [m.to(memory_format=torch.channels_last) for m in modules]
    compare(modules, x)
    compare_training(modules, x)


def test_unbatched_convolution() -> None:
    torch.manual_seed(0)
    modules: list[nn.Module] = [
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        BatchwiseDropout(dim=-3),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3),
    ]
    modules = [m.double() for m in modules]
    compare(modules, inputs((9, 9), 3))
    compare_training(modules, inputs((9, 9), 3))
    # The usual dim is then the height, and masks what the layer alone would.
    modules[2].dim = 1
    compare(modules, inputs((9, 9), 3))
    compare([*modules, nn.Flatten(), nn.Linear(1, 2).double()], inputs((9, 9), 3))


def test_linear_on_sequences() -> None:
    modules: list[nn.Module] = [nn.Linear(6, 16), nn.GELU(), BatchwiseDropout(dim=-1), nn.Linear(16, 6)]
    modules = [m.double() for m in modules]
    compare(modules, inputs((7, 6)))
    compare(modules, inputs((2, 7, 6)))
    compare(modules, inputs((), 6))  # one sample without a batch
    with pytest.raises(ValueError, match="without a dimension 1"):
        SubmatrixSequential(nn.Linear(6, 4), BatchwiseDropout(), mode="submatrix")(torch.randn(6))
