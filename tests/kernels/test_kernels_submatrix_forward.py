"""The kernels for several patterns at once, and for a layer of which nothing is kept for the way back."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from batchlab import kernels
from batchlab.functional.submatrix_linear import KeptLinear, chain_of_kept

K = kernels.submatrix

pytestmark = pytest.mark.skipif(not K.available(), reason="no C++ compiler")


def test_patterns_are_those_of_randperm() -> None:
    sizes, counts = [0, 1, 17, 784, 800], [0, 1, 0, 627, 800]
    torch.manual_seed(3)
    expected = [torch.randperm(size)[:count].sort().values for size, count in zip(sizes, counts, strict=True)]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    found = K.draw(sizes, counts)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, theirs)
    assert K.draw([], []) == []


@pytest.mark.parametrize(("sizes", "counts"), [([3], [4]), ([3], [-1]), ([3, 4], [1])])
def test_impossible_patterns_are_refused(sizes: list[int], counts: list[int]) -> None:
    with pytest.raises(RuntimeError, match="count"):
        K.draw(sizes, counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outputs", [0, 1, 83, 700])  # the last: several tiles, and a remainder
def test_the_block_is_left_out_where_it_is_not_needed(outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(900, 1001, generator=generator, dtype=dtype)
    bias = torch.randn(900, generator=generator, dtype=dtype)
    rows = torch.randperm(900, generator=generator)[:outputs].sort().values
    columns = torch.randperm(1001, generator=generator)[:777].sort().values
    x = torch.randn(5, 777, generator=generator, dtype=dtype)
    block = weight.double().numpy()[rows.numpy()][:, columns.numpy()]
    expected = torch.from_numpy(0.5 * x.double().numpy() @ block.T + bias.double().numpy()[rows.numpy()])
    tolerance = {"rtol": 0, "atol": 1e-3 if dtype == torch.float32 else 1e-11}
    for needed in (True, False):
        y, kept = K.linear_forward(x, weight, bias, rows, columns, 0.5, False, needed)
        torch.testing.assert_close(y.double(), expected, **tolerance)
        assert kept.shape == (outputs if needed else 0, 777)
        assert not needed or torch.equal(kept.double(), torch.from_numpy(block))
    bare, _ = K.linear_forward(x, weight, None, rows, columns, 0.5, True, False)
    torch.testing.assert_close(bare.double(), (expected - bias[rows].double()).relu(), **tolerance)


def test_unsorted_and_foreign_indices_are_named() -> None:
    weight = torch.ones(6, 6)
    for kept, number in (([0, 2, 2], 2), ([1, 0], 1), ([-1, 2], 0), ([0, 6], 1)):
        with pytest.raises(RuntimeError, match=f"sorted, distinct and below 6; number {number} is {kept[number]}"):
            K.gather(weight, torch.tensor(kept), None)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [("weights", [False, True]), ("input", [True, True]), ("last", [False, False]), ("first bias", [False, True])],
)
def test_blocks_are_kept_for_gradients_that_go_on(
    trained: str, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    forward = K.linear_forward

    def watched(*given: object) -> tuple[Tensor, Tensor]:
        asked.append(given[-1])
        return forward(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(K, "linear_forward", watched)
    rows, columns = torch.tensor([1, 2, 5]), torch.tensor([0, 3])
    x = torch.randn(4, 2, dtype=torch.float64)
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4), (6,), (2, 6), (2,))]
    wanted: Sequence[Tensor] = {
        "weights": tensors,
        "input": [x],
        "last": tensors[2:],
        "first bias": tensors[1:2],
    }[trained]
    for tensor in wanted:
        tensor.requires_grad_()

    def chain(x: Tensor, first: Tensor, first_bias: Tensor, last: Tensor, last_bias: Tensor) -> Tensor:
        layers = [
            KeptLinear(first, first_bias, rows, columns, 1.5, True),
            KeptLinear(last, last_bias, None, rows, 2.0, False),
        ]
        return chain_of_kept(x, layers)

    chain(x, *tensors)
    assert asked == expected
    assert torch.autograd.gradcheck(chain, (x, *tensors))
