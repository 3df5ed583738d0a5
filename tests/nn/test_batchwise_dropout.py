"""The layer alone: it masks, draws one pattern for a batch, and is the identity in evaluation."""

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchlab.functional import draw_pattern
from batchlab.nn import BatchwiseDropout


def own(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 10), (1, 10), (0, 10), (2, 10, 4), (2, 10, 3, 3), (2, 10, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bernoulli"])
def test_masks_the_same_features_of_all_samples(exact: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = BatchwiseDropout(0.3, exact=exact, generator=own())
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    assert torch.equal(layer.kept, draw_pattern(10, 0.3, exact=exact, generator=own()))
    scale = 10 / 7 if exact else 1 / 0.7
    mask = torch.zeros(10, dtype=dtype).index_fill(0, layer.kept, scale).view(1, 10, *[1] * (x.ndim - 2))
    assert y.dtype == dtype
    assert torch.equal(y, x * mask)
    y.sum().backward()
    assert torch.equal(x.grad, mask.expand(shape))


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bernoulli"])
def test_is_unbiased(exact: bool, p: float) -> None:
    layer = BatchwiseDropout(p, exact=exact, generator=own(1))
    draws = 3000
    mean = torch.stack([layer(torch.ones(1, 10))[0] for _ in range(draws)]).mean(0)
    spread = (p / (1 - p) / draws) ** 0.5
    assert (mean - 1).abs().max() <= 5 * spread + 1e-6


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bernoulli"])
def test_extreme_rates(exact: bool) -> None:
    x = torch.randn(3, 10)
    layer = BatchwiseDropout(0.0, exact=exact)
    state = torch.get_rng_state()
    assert torch.equal(layer(x), x)
    assert torch.equal(layer.kept, torch.arange(10))
    assert torch.equal(torch.get_rng_state(), state)  # nothing to draw
    layer = BatchwiseDropout(1.0, exact=exact)
    assert torch.equal(layer(x), torch.zeros(3, 10))
    assert len(layer.kept) == 0
    layer = BatchwiseDropout(0.99, exact=exact)
    for _ in range(20):
        assert layer(x).isfinite().all()
    assert BatchwiseDropout(1, exact=exact).p == 1


def test_train_and_eval() -> None:
    layer = BatchwiseDropout(0.5)
    assert layer.kept is None
    x = torch.randn(3, 10)
    layer(x)
    assert len(layer.kept) == 5
    layer.eval()
    assert layer.kept is None
    assert layer(x) is x
    assert layer(torch.randn(())).ndim == 0  # whatever comes
    layer.train()
    assert layer.kept is None
    layer(x)
    nn.Sequential(layer).eval()
    assert layer.kept is None
    layer.training = True
    layer(x)
    layer.training = False
    layer(x)
    assert layer.kept is None


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_dim(dim: int) -> None:
    x = torch.ones(4, 6, 8)
    layer = BatchwiseDropout(0.5, dim=dim)
    y = layer(x)
    kept = y.movedim(dim, 0).flatten(1).amax(1).nonzero().view(-1)
    assert torch.equal(kept, layer.kept)
    assert len(kept) == x.shape[dim] // 2
    assert y.sum() == x.sum()


def test_errors() -> None:
    for p in (-0.1, 1.5, float("nan"), "x", None, True):
        with pytest.raises(ValueError, match="share of features to drop, from 0 to 1"):
            BatchwiseDropout(p)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"input has shape \(4,\), without a dimension 1"):
        BatchwiseDropout()(torch.zeros(4))
    with pytest.raises(ValueError, match=r"BatchwiseDropout\(dim=...\)"):
        BatchwiseDropout(0.0, dim=-3)(torch.zeros(4, 5))
    on_gpu: Any = type("OnGPU", (), {"device": torch.device("cuda")})()
    with pytest.raises(ValueError, match="drawn on the CPU"):
        BatchwiseDropout(generator=on_gpu)


def test_repr() -> None:
    assert repr(BatchwiseDropout()) == "BatchwiseDropout(p=0.5)"
    assert repr(BatchwiseDropout(0.2, exact=False, dim=-1)) == "BatchwiseDropout(p=0.2, exact=False, dim=-1)"


def test_has_no_state() -> None:
    layer = BatchwiseDropout(0.5, generator=own())
    layer(torch.ones(2, 8))
    assert not layer.state_dict()
    assert not list(layer.parameters())
    assert not list(layer.buffers())
    layer.load_state_dict({}, strict=True)
    layer.to(torch.float64).half().to("meta")


@pytest.mark.parametrize("generator", [False, True], ids=["default-generator", "own-generator"])
def test_copies_and_pickles(generator: bool) -> None:
    layer = BatchwiseDropout(0.5, exact=False, dim=-1, generator=own(7) if generator else None)
    x = torch.ones(2, 30)
    layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)]
    torch.manual_seed(0)
    expected = layer(x)
    for other in others:
        assert repr(other) == repr(layer)
        torch.manual_seed(0)
        assert torch.equal(other(x), expected)  # a copy's generator goes on from where it was


def test_patterns_do_not_depend_on_the_process() -> None:
    code = (
        "import torch; from batchlab.nn import BatchwiseDropout\n"
        "torch.manual_seed(5); a = BatchwiseDropout(0.5); b = BatchwiseDropout(0.5, exact=False)\n"
        "c = BatchwiseDropout(0.2, generator=torch.Generator().manual_seed(9))\n"
        "for layer in (a, b, c, a): layer(torch.ones(2, 20)); print(layer.kept.tolist())"
    )
    # Another number of threads, too.
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if torch.get_num_threads() > 1 else "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    torch.manual_seed(5)
    first, second = draw_pattern(20, 0.5), draw_pattern(20, 0.5, exact=False)
    third, fourth = draw_pattern(20, 0.2, generator=own(9)), draw_pattern(20, 0.5)
    assert done.stdout.splitlines() == [str(kept.tolist()) for kept in (first, second, third, fourth)]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("generator", [False, True], ids=["default-generator", "own-generator"])
def test_a_checkpoint_computes_again_with_the_same_pattern(generator: bool, reentrant: bool) -> None:
    layer = BatchwiseDropout(0.5, generator=own() if generator else None)
    linear = nn.Linear(8, 8)
    drawn = []

    def block(x: Tensor) -> Tensor:
        y = layer(linear(x))
        drawn.append(layer.kept.tolist())
        return y.sin()

    for _ in range(3):
        x = torch.randn(4, 8, requires_grad=True)
        y = checkpoint(block, x, use_reentrant=reentrant)
        kept = layer.kept.clone()
        y.sum().backward()
        assert drawn[-1] == drawn[-2]
        dropped = torch.ones(8, dtype=torch.bool).index_fill(0, kept, False)
        assert not linear.weight.grad[dropped].any()
        assert linear.weight.grad[kept].any(1).all()
        linear.zero_grad()
    assert len({tuple(d) for d in drawn}) > 1
    assert len(drawn) == 6


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
}


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_pattern_outlives_a_transform(name: str, p: float) -> None:
    layer = BatchwiseDropout(p)
    TRANSFORMS[name](lambda x: layer(x).sum())(torch.ones(2, 8))
    assert layer.kept.tolist() == copy.deepcopy(layer).kept.tolist()


def test_vmap_with_one_pattern_for_all() -> None:
    layer = BatchwiseDropout(0.5)
    y = torch.func.vmap(layer, randomness="same")(torch.ones(5, 2, 8))
    assert torch.equal(y, y[:1, :1].expand_as(y))
    assert y.sum() == y.numel()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"exact": False}, {"generator": True}, {"p": 0.0}, {"p": 1.0}], ids=str)
def test_compiles(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    plain = "exact" not in options and "generator" not in options
    layers = []
    for _ in range(2):
        given = {**options, "generator": own()} if "generator" in options else options
        layers.append(BatchwiseDropout(**given))
    compiled = torch.compile(layers[1], fullgraph=plain, backend="aot_eager")
    for seed in range(3):
        results = []
        for function in (layers[0], compiled):
            torch.manual_seed(seed)
            x = torch.ones(4, 12, requires_grad=True)
            y = function(x)
            y.sum().backward()
            results.append((y.detach(), x.grad))
        torch.testing.assert_close(results[0], results[1])
        assert torch.equal(layers[0].kept, layers[1].kept)
    for layer in (layers[0], compiled):
        assert torch.equal(layer.eval()(torch.ones(2, 3)), torch.ones(2, 3))
    assert layers[1].kept is None
