"""Sums and moments of all ranks of a process group, on any backend that can all-reduce (gloo on CPU too).

What travels is float64, whatever the tensors are: ranks may differ in dtype, and a float32 cannot count to 17 million.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.reference.batch_norm import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["check_process_group", "merge_over_ranks", "pool_over_ranks", "sum_over_ranks"]


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


def sum_over_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of every rank's `x`, in float64: one all-reduce forward, and one for each gradient, of any order."""
    return _AllReduceSum.apply(x.to(torch.float64), group)  # type: ignore[no-any-return, no-untyped-call]


def pool_over_ranks(local: Moments, offset: Tensor, group: ProcessGroup) -> tuple[Tensor, Moments]:
    """Pool the moments of every rank of `group`, without gradient; a rank without samples counts nothing.

    pivot = Σ n_r offset_r / n,  δ_r = (offset_r - pivot) + mean_r
    mean = Σ n_r δ_r / n,  M2 = Σ M2_r + n_r (δ_r - mean)²

    Each rank's mean is given relative to its own `offset` (see `reference.batch_norm.center`), and the result is
    relative to the pivot: the difference of two offsets is exact where their sum would be rounded.

    One all-reduce of (ranks, 3C + 1) numbers. Every rank must call this the same number of times.

    Returns:
        the pivot and the moments relative to it, in float64, the same bits on every rank.
    """
    world, rank, features = dist.get_world_size(group), dist.get_rank(group), offset.numel()
    own = torch.cat([part.detach().to(torch.float64) for part in (local.count.view(1), offset, local.mean, local.m2)])
    # A sum over ranks of rows that are zero but for one's own is a gather; unlike gather, every backend has it.
    before, after = own.new_zeros(rank, own.numel()), own.new_zeros(world - rank - 1, own.numel())
    rows = sum_over_ranks(torch.cat([before, own[None], after]), group)
    counts, offsets, means, m2s = rows.split([1, features, features, features], dim=1)
    count = counts.sum()
    share = counts / count.clamp(min=1)
    pivot = (share * offsets).sum(0)
    relative = (offsets - pivot) + means
    mean = (share * relative).sum(0)
    return pivot, Moments(count, mean, m2s.sum(0) + (counts * (relative - mean).square()).sum(0))


def merge_over_ranks(local: Moments, offset: Tensor, group: ProcessGroup) -> Moments:
    """What `pool_over_ranks` returns, relative to this rank's `offset` and in its dtype."""
    pivot, pooled = pool_over_ranks(local, offset, group)
    return Moments(*(part.to(offset.dtype) for part in pooled._replace(mean=(pivot - offset) + pooled.mean)))
