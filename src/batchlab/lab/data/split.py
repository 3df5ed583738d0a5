"""Hold out part of a labelled data set, with the same share of every class."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor


def hold_out(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split off a validation set in which each class has the share it has in the whole.

    Class c of n_c among N examples gives count * n_c / N of them, rounded down; what rounding leaves goes, one each,
    to the classes with the largest remainders (the smaller label first). Both parts come in random order, the same
    one for the same seed.

    Args:
        images: (N, ...) any dtype.
        labels: (N,) any integer dtype.
        count: How many examples to hold out, 1 to N - 1.
        seed: Which examples, and in which order.

    Returns:
        train_images, train_labels, validation_images, validation_labels: copies, of the dtypes given.

    Raises:
        TypeError: `count` is not an int, or `labels` are not integers.
        ValueError: `count` is out of range, or images and labels do not have the same length.

    Example:
        >>> images, labels = torch.arange(10), torch.tensor([0, 1] * 5)
        >>> train, _, validation, validation_labels = hold_out(images, labels, count=4, seed=0)
        >>> len(train), len(validation), sorted(validation_labels.tolist())
        (6, 4, [0, 0, 1, 1])
    """
    _check_arguments(images, labels, count)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    shuffled = labels[order]
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label, quota in _share_out(labels, count).items():
        held[torch.nonzero(shuffled == label).squeeze(1)[:quota]] = True
    train, validation = order[~held], order[held]
    return (
        images[train.to(images.device)],
        labels[train],
        images[validation.to(images.device)],
        labels[validation],
    )


def _share_out(labels: Tensor, count: int) -> dict[int, int]:
    """Return label -> how many to hold out; in whole numbers, so that no rounding error decides."""
    sizes = Counter(labels.tolist())
    quotas = {label: count * size // len(labels) for label, size in sizes.items()}
    remainders = {label: count * size % len(labels) for label, size in sizes.items()}
    left = count - sum(quotas.values())
    for label in sorted(sizes, key=lambda label: (-remainders[label], label))[:left]:
        quotas[label] += 1
    return quotas


def _check_arguments(images: Tensor, labels: Tensor, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count must be an int, the number of examples to hold out; got {count!r}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}; convert them with labels.long()")
    if labels.ndim != 1 or images.ndim == 0 or len(images) != len(labels):
        raise ValueError(
            f"images (N, ...) and labels (N,) must have the same length; got shapes {tuple(images.shape)} "
            f"and {tuple(labels.shape)}"
        )
    if not 0 < count < len(labels):
        raise ValueError(
            f"count must be from 1 to {len(labels) - 1}, so that both parts of the {len(labels)} examples have "
            f"at least one; got {count}"
        )
