"""Holding out a validation set: exact shares, nothing lost, the same for the same seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.lab.data.split import hold_out


def test_each_class_gives_its_share() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    _, train_labels, _, validation_labels = hold_out(torch.arange(100), labels, count=20, seed=1)
    assert validation_labels.bincount().tolist() == [12, 6, 2]
    assert train_labels.bincount().tolist() == [48, 24, 8]


def test_what_rounding_leaves_goes_to_the_largest_remainders() -> None:
    # Shares of 5 among (3, 4, 4): 1.36, 1.82, 1.82; the two left after rounding down go to classes 1 and 2.
    labels = torch.tensor([2] * 4 + [1] * 4 + [0] * 3)
    _, _, _, validation_labels = hold_out(torch.arange(11), labels, count=5, seed=0)
    assert validation_labels.bincount().tolist() == [1, 2, 2]
    # Equal remainders: the smaller label first, whatever the order of the examples.
    _, _, _, tied = hold_out(torch.arange(9), torch.tensor([2, 1, 0] * 3), count=4, seed=0)
    assert tied.bincount().tolist() == [2, 1, 1]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_every_example_is_in_exactly_one_part(data: st.DataObject, sizes: list[int], seed: int) -> None:
    total = sum(sizes)
    if total < 2:
        sizes, total = [*sizes, 1], total + 1
    count = data.draw(st.integers(1, total - 1))
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    images = torch.arange(total)
    train, train_labels, validation, validation_labels = hold_out(images, labels, count, seed)
    assert sorted(train.tolist() + validation.tolist()) == list(range(total))
    assert len(validation) == len(validation_labels) == count
    assert torch.equal(labels[train], train_labels)
    assert torch.equal(labels[validation], validation_labels)
    for label, size in enumerate(sizes):
        assert abs(int((validation_labels == label).sum()) - count * size / total) < 1


def test_the_seed_decides() -> None:
    images, labels = torch.arange(200), torch.arange(200) % 10
    first, again, other = (hold_out(images, labels, 50, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert set(first[2].tolist()) != set(other[2].tolist())


def test_both_parts_are_shuffled_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    train, train_labels, _, validation_labels = hold_out(torch.arange(100), torch.arange(100) // 10, 20, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert train.tolist() != sorted(train.tolist())
    assert train_labels.tolist() != sorted(train_labels.tolist())
    assert validation_labels.tolist() != sorted(validation_labels.tolist())


def test_dtypes_and_shapes_are_kept_and_the_result_is_a_copy() -> None:
    images, labels = torch.zeros(6, 28, 28, dtype=torch.uint8), torch.tensor([0, 1] * 3)
    train, train_labels, validation, validation_labels = hold_out(images, labels, 2, seed=0)
    assert (train.shape, validation.shape) == ((4, 28, 28), (2, 28, 28))
    assert (train.dtype, train_labels.dtype, validation_labels.dtype) == (torch.uint8, torch.int64, torch.int64)
    train.fill_(1)
    validation.fill_(1)
    assert images.count_nonzero() == 0


@pytest.mark.parametrize("count", [0, -1, 4, 5])
def test_a_count_that_leaves_a_part_empty_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count must be from 1 to 3.*got {count}"):
        hold_out(torch.arange(4), torch.arange(4), count, seed=0)


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same length; got shapes \(4,\) and \(3,\)"):
        hold_out(torch.arange(4), torch.arange(3), 1, seed=0)
    with pytest.raises(ValueError, match=r"same length; got shapes \(4,\) and \(4, 1\)"):
        hold_out(torch.arange(4), torch.zeros(4, 1, dtype=torch.int64), 1, seed=0)
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        hold_out(torch.arange(4), torch.zeros(4), 1, seed=0)
    with pytest.raises(TypeError, match=r"count must be an int.*got 0\.25"):
        hold_out(torch.arange(4), torch.arange(4), 0.25, seed=0)  # type: ignore[arg-type]
