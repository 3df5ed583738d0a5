"""Residual branches that run on a part of the batch only (Huang et al. 2016, stochastic depth, sample by sample)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchlab.functional.dropout_pattern import check_rate, draw, draw_count, kept_count

__all__ = ["drop_path"]


def _kept_rows(rows: int, p: float, exact: bool) -> tuple[Tensor | None, float]:
    """Which rows run through the branch (None: all), and what their results are multiplied by."""
    if not exact:
        return draw(rows, p, False, None), 1 / (1 - p)
    # At least one row: with none the branch would never learn from small batches, and the mean would be wrong.
    count = min(rows, max(1, kept_count(rows, p)))
    return (None, 1.0) if count == rows else (draw_count(rows, count, None), rows / count)


def _select(input: Tensor, kept: Tensor) -> Tensor:  # noqa: A002
    """The kept rows, in the memory format of the input: index_select makes them contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.ndim)
    if last is None or input.is_contiguous() or not input.is_contiguous(memory_format=last):
        return input.index_select(0, kept)
    return input.movedim(1, -1).index_select(0, kept).movedim(-1, 1)


def _run(branch: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    result = branch(rows)
    if not isinstance(result, Tensor):
        raise TypeError(f"the branch returned {type(result).__name__}; a residual branch returns one tensor")
    if result.shape != rows.shape:
        raise ValueError(
            f"the branch turned {tuple(rows.shape)} into {tuple(result.shape)}; a residual branch keeps the shape of "
            "its input, because both are added"
        )
    return result


def drop_path(
    input: Tensor,  # noqa: A002
    branch: Callable[[Tensor], Tensor],
    p: float = 0.5,
    training: bool = True,
    *,
    exact: bool = True,
) -> Tensor:
    """Add a branch to its input, in training computed only for the samples that keep it; see `batchlab.nn.DropPath`.

    >>> import torch
    >>> y = drop_path(torch.zeros(4, 3), torch.ones_like, 0.5)
    >>> sorted(y[:, 0].tolist())
    [0.0, 0.0, 2.0, 2.0]
    """
    check_rate(p)
    if input.ndim == 0:
        raise ValueError("the input has no dimensions; the first one holds the samples")
    if not training or p == 0:
        return input + _run(branch, input)
    if p == 1:
        return input
    kept, scale = _kept_rows(input.shape[0], p, exact)
    if kept is None:
        return input + _run(branch, input)
    if kept.shape[0] == 0:
        return input
    kept = kept.to(input.device, non_blocking=True)
    result = _run(branch, _select(input, kept))
    dtype = torch.promote_types(input.dtype, result.dtype)  # autocast makes them different
    # A clone keeps the memory format, which index_add alone does not.
    return input.to(dtype, copy=True).index_add_(0, kept, result.to(dtype), alpha=scale)
