"""Moments of all ranks of a process group, differentiable, on any backend that can all-reduce (gloo on CPU too)."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.reference.batch_norm import Moments, merge_moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["check_process_group", "merge_over_ranks"]


class _AllReduceSum(torch.autograd.Function):
    """y = Σ over ranks of x. If the loss is the sum of the ranks' losses, so is the gradient: Σ over ranks of ∂l/∂y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _AllReduceSum.apply(grad_outputs[0], ctx.group), None  # type: ignore[no-untyped-call]


def check_process_group(group: object) -> None:
    """Raise unless `group` is an initialized process group that this process belongs to."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "process_group was given, but torch.distributed is not initialized. Call "
            "torch.distributed.init_process_group first (torchrun sets what it needs), or pass process_group=None."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is {group!r}; it must be a torch.distributed.ProcessGroup of which this rank is a member, "
            "such as torch.distributed.group.WORLD or what torch.distributed.new_group returns on its members."
        )


def merge_over_ranks(local: Moments, offset: Tensor, group: ProcessGroup) -> Moments:
    """Merge the moments of every rank of `group`, weighted by their counts; an empty rank counts nothing.

    Each rank's mean is given relative to its own `offset` (see `reference.batch_norm.center`), and the result is
    relative to this rank's: the difference of two offsets is exact where their sum would be rounded.

    One all-reduce of (ranks, 3C + 1) numbers forward, one backward. Every rank must call this the same number of times.
    """
    world, rank, features = dist.get_world_size(group), dist.get_rank(group), offset.numel()
    own = torch.cat([local.count.view(1), offset, local.mean, local.m2])
    # A sum over ranks of rows that are zero but for one's own is a gather; unlike gather, every backend has it.
    before, after = own.new_zeros(rank, own.numel()), own.new_zeros(world - rank - 1, own.numel())
    rows: Tensor = _AllReduceSum.apply(torch.cat([before, own[None], after]), group)  # type: ignore[no-untyped-call]
    counts, offsets, means, m2s = rows.split([1, features, features, features], dim=1)
    groups = [
        Moments(count.squeeze(0), (other.detach() - offset) + mean, m2)
        for count, other, mean, m2 in zip(counts, offsets, means, m2s, strict=True)
    ]
    # A rank without samples has no mean: keep its zeros from being shifted into one.
    groups = [Moments(g.count, torch.where(g.count > 0, g.mean, 0), g.m2) for g in groups]
    return reduce(merge_moments, groups)
