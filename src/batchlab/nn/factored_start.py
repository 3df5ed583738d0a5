"""A start from data (Salimans & Kingma 2016, section 3): gains and biases that normalize the first batch."""

from __future__ import annotations

import torch
from torch import Tensor

from batchlab.reference.batch_norm import moments, variance

__all__ = ["normalizing_gain"]

ROUNDING = 1e-12  # of a sum computed in float64, relative to the largest that the terms could add up to


def _units(constant: Tensor) -> str:
    numbers = constant.nonzero().flatten().tolist()
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


@torch.no_grad()
def normalizing_gain(t: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return 1/std and -mean/std of each unit over the batch and positions, in float64.

    Args:
        t: (N, units, ...), float64, what the units return with gain 1 and bias 0.
        largest: the largest |t| that the terms of its sums could add up to.
        dtype: of the inputs that t was computed from; deviations below its resolution are none.

    Raises:
        ValueError: fewer than two values per unit, or a unit that returns the same for all of them.
    """
    group = moments(t)
    if int(group.count) < 2:
        raise ValueError(f"the batch has {int(group.count)} values per unit, and a deviation needs at least two")
    std = variance(group).sqrt()
    unit_largest = t.abs().movedim(1, 0).flatten(1).amax(1)
    least = (unit_largest * torch.finfo(dtype).eps).clamp(min=largest * ROUNDING)
    constant = ~(std > least)  # NaN too
    if constant.any():
        raise ValueError(
            f"{int(constant.sum())} of {len(std)} units return the same for the whole batch, or nothing finite (units "
            f"{_units(constant)}), so that no gain gives them a deviation of 1; nothing was changed. Look for zero "
            "weights, and for inputs that are constant, inf or NaN"
        )
    return 1 / std, -group.mean / std
