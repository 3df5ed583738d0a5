"""Statistics of several processes: which ranks belong to a layer, whether they all came through, and their sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from batchlab.functional.gather import merge_over_ranks
from batchlab.surgery.layers import ChannelNorm
from batchlab.surgery.population import Population

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["agree", "group_of", "over_ranks"]


def group_of(layer: ChannelNorm) -> ProcessGroup | None:
    """Return the ranks that a layer itself normalizes over; None: this process alone."""
    if isinstance(layer, nn.SyncBatchNorm):
        synchronized = dist.is_available() and dist.is_initialized()
        return (layer.process_group or dist.group.WORLD) if synchronized else None
    return getattr(layer, "process_group", None)


def agree(error: Exception | None, batches: int, group: ProcessGroup, device: torch.device) -> int:
    """Return the number of batches on all ranks; raise on every rank if one has failed, so that none waits for it."""
    state = torch.tensor([int(error is not None), batches], dtype=torch.float64, device=device)
    dist.all_reduce(state, group=group)
    if error is None and state[0] > 0:
        raise RuntimeError("recalibrate failed on another rank; the model is as it was, here and there")
    return int(state[1])


def over_ranks(population: Population, group: ProcessGroup | None) -> Population:
    """Return the population of all ranks together, the same numbers on each; ranks may be uneven or empty."""
    if group is None:
        return population
    # With an offset of zero every rank merges the same numbers in the same order: bitwise equal results.
    offset = torch.zeros_like(population.samples.mean)
    return Population(*(merge_over_ranks(moments, offset, group) for moments in population))
