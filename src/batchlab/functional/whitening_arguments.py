"""What whitening is called with: each check says what was given, what is allowed and what to do."""

from __future__ import annotations

import math

from torch import Tensor

from batchlab.functional.batch_norm_training import samples_per_channel
from batchlab.reference.whitening import METHODS

__all__ = [
    "check_group_size",
    "check_sample_count",
    "check_tensors",
    "check_whitening",
    "running_statistics",
    "shape_of",
]


def check_whitening(eps: float, method: str, iterations: int) -> None:
    """Raise ValueError unless these settings make a whitening."""
    if not 0 < eps < math.inf:  # NaN is not either
        raise ValueError(
            f"eps is {eps}; it must be above 0, because a batch with fewer samples than channels, or with a constant "
            "or repeated channel, has a singular covariance"
        )
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(map(repr, METHODS))}")
    if not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations is {iterations!r}; it must be a whole number, 0 or more (the paper uses 5)")


def check_group_size(num_features: int, group_size: int | None) -> int:
    """Return how many channels a group has; ValueError if they do not divide the features."""
    if num_features < 1:
        raise ValueError(f"there are {num_features} channels; whitening needs at least one")
    if group_size is None:
        return num_features
    if isinstance(group_size, int) and group_size >= 1 and num_features % group_size == 0:
        return group_size
    divisors = [size for size in range(1, num_features + 1) if num_features % size == 0]
    below = [size for size in divisors if size < group_size][-1:]
    above = [size for size in divisors if size > group_size][:1]
    raise ValueError(
        f"group_size is {group_size}, which does not divide the {num_features} channels into equal groups; the nearest "
        f"that do: {', '.join(map(str, below + above))} (None: one group of all channels)"
    )


def shape_of(x: Tensor) -> str:
    """(2, 3) for a tensor of that shape, as error messages show it."""
    return f"({', '.join(map(str, x.shape))})"


def check_tensors(x: Tensor, group_size: int | None, tensors: dict[str, Tensor | None]) -> int:
    """Check the input and what goes with its channels; returns the channels of a group."""
    if x.ndim < 2:
        raise ValueError(f"x has shape {shape_of(x)}; whitening needs (N, C, ...), with channels in dimension 1")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; whitening needs a real floating-point input: call x.float() first")
    channels = x.shape[1]
    size = check_group_size(channels, group_size)
    matrices = (channels // size, size, size)
    allowed: dict[str, list[tuple[int, ...]]] = {"running_covariance": [matrices], "weight": [(channels,), matrices]}
    for name, value in tensors.items():
        shapes = allowed.get(name, [(channels,)])
        if value is not None and all(value.shape != shape for shape in shapes):
            raise ValueError(
                f"{name} has shape {shape_of(value)}; for x of shape {shape_of(x)} in groups of {size} channels it "
                f"must be {' or '.join(map(str, shapes))}"
            )
    return size


def check_sample_count(x: Tensor) -> None:
    """Raise ValueError for a batch with one value per channel: it has no covariance."""
    if samples_per_channel(x) == 1:
        raise ValueError(
            f"x of shape {shape_of(x)} has one value per channel, and batch statistics need at least two. Use larger "
            "batches (DataLoader(drop_last=True) drops a last odd one), or running statistics: training=False in the "
            "function, .eval() or statistics='running' on the layer."
        )


def running_statistics(running_mean: Tensor | None, running_covariance: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both running statistics, or None if there are neither; ValueError if one is missing."""
    if running_mean is not None and running_covariance is not None:
        return running_mean, running_covariance
    if running_mean is None and running_covariance is None:
        return None
    missing = "running_mean" if running_mean is None else "running_covariance"
    raise ValueError(f"{missing} is None and the other is not: give both running statistics or neither")
