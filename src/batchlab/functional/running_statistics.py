"""How running statistics take in a batch: in place, without a synchronisation, all channels or none half-way."""

from __future__ import annotations

from functools import reduce
from typing import Final

import torch
from torch import Tensor

from batchlab.reference.batch_norm import average

__all__ = ["NONFINITE", "check_finite", "check_momentum", "check_nonfinite", "move_in_place", "update_in_place"]

NONFINITE: Final = ("propagate", "skip", "raise")


def check_nonfinite(nonfinite: str) -> None:
    """Raise ValueError unless `nonfinite` is one of `NONFINITE`."""
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite is {nonfinite!r}; allowed are {', '.join(map(repr, NONFINITE))}")


def check_finite(finite: Tensor) -> None:
    """Raise ValueError, naming channels, unless `finite`, (C,), is all True; reads it on the host."""
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ValueError(
            f"non-finite batch statistics in {len(bad)} of {finite.numel()} channels ({shown}); the running statistics "
            "are unchanged. Look for inf or NaN in the layer's input (an overflow in half precision, a learning rate "
            "too high), or use nonfinite='skip' to leave such channels out."
        )


def update_in_place(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
    nonfinite: str,
) -> None:
    """Move the running statistics towards a batch's mean and unbiased variance; see `move_in_place`."""
    move_in_place([(running_mean, mean), (running_var, var)], count, momentum, num_batches_tracked, nonfinite)


def move_in_place(
    statistics: list[tuple[Tensor, Tensor]],
    count: int | Tensor,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
    nonfinite: str,
) -> None:
    """Move running statistics, the first of each pair, towards those of a batch, the second.

    running = (1 - momentum) · running + momentum · batch;  momentum None: 1/num_batches_tracked, the plain average

    A batch of fewer than two valid samples per channel has no unbiased variance and changes nothing, nor does it count
    as a batch. With `nonfinite="skip"` the channels with a non-finite statistic stay as they were; "raise" looks at the
    values on the host (one synchronisation; not under `torch.compile(fullgraph=True)`) before anything changes.

    Expects detached tensors: a `no_grad` of its own would cost 5 µs a call.
    """
    # A tensor where the count is known on the device only; else a number, symbolic in a compiled layer.
    if not isinstance(count, Tensor) and count < 2:
        return
    usable = count > 1 if isinstance(count, Tensor) else True
    accepted: Tensor | bool = usable
    if nonfinite != "propagate":
        finite = reduce(torch.logical_and, [new.isfinite() for _, new in statistics])
        if nonfinite == "raise":
            check_finite(finite | ~usable if isinstance(usable, Tensor) else finite)
        else:
            accepted = finite & usable if isinstance(usable, Tensor) else finite
    if num_batches_tracked is not None:
        num_batches_tracked.add_(usable)
    weight: float | Tensor
    if momentum is not None:
        weight = momentum
    else:
        if num_batches_tracked is None:
            raise ValueError("momentum=None averages over all batches and needs num_batches_tracked, an integer tensor")
        weight = 1 / num_batches_tracked.clamp(min=1).to(statistics[0][0].dtype)
    for running, new in statistics:
        if accepted is True and isinstance(weight, float):
            running.lerp_(new.to(running.dtype), weight)  # `average` in one pass
            continue
        updated = average(running, new, weight)
        running.copy_(updated if accepted is True else torch.where(torch.as_tensor(accepted), updated, running))


def check_momentum(momentum: float | None) -> None:
    """Raise ValueError unless `momentum` is None or a number from 0 to 1, the weight of the new value."""
    if momentum is not None and not 0 <= momentum <= 1:  # NaN is not either
        raise ValueError(
            f"momentum is {momentum}; it is the weight of the newest batch, from 0 to 1, or None for the plain average "
            "(other libraries' `decay` is 1 - momentum)"
        )
