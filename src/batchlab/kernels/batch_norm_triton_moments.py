"""Statistics of batch normalization on the GPU, in one reading of x (Chan, Golub & LeVeque 1983).

Bytes: x once. Numbers are added around a pivot close to their mean, three flops each where an H100 has time for 80 (67
Tflop/s of float32 over 3.3 TB/s, four bytes a number): what a running mean costs more would be free as well, but its
roundings grow with mean/std, and these do not. No atomics: every sum has one order, given by the shapes alone.
"""

import triton
import triton.language as tl

from batchlab.kernels.batch_norm_triton_tiles import divide, positions_before, program_range, tile

__all__ = ["merge_moments", "moments"]


@triton.jit
def _around(
    x, pivot, begin, end, block, channels, plane, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Σ (x - pivot) and Σ (x - pivot)² over the steps begin .. end - 1, per channel."""
    total = tl.zeros([BLOCK_C, BLOCK_S], dtype=pivot.dtype)
    squares = tl.zeros([BLOCK_C, BLOCK_S], dtype=pivot.dtype)
    for step in range(begin, end):
        offsets, valid = tile(step, block, channels, plane, ROWS, BLOCK_C, BLOCK_S)
        value = tl.load(x + offsets, mask=valid, other=0).to(pivot.dtype)
        distance = tl.where(valid, value - pivot[:, None], 0)
        total += distance
        squares += distance * distance
    return tl.sum(total, axis=1), tl.sum(squares, axis=1)


@triton.jit
def _store_statistics(statistics, pivot, offset, variance, channels, c):
    """Store the mean pivot + offset as two numbers, its rounded value and what rounding lost, and the variance."""
    mean = pivot + offset
    back = mean - pivot
    lost = (pivot - (mean - back)) + (offset - back)  # Knuth's two-sum: exact whichever of the two is larger
    tl.store(statistics + c, mean, mask=c < channels)
    tl.store(statistics + channels + c, lost, mask=c < channels)
    tl.store(statistics + 2 * channels + c, variance, mask=c < channels)


@triton.jit(do_not_specialize=["steps", "per_program", "splits"])
def moments(
    x,
    out,
    steps,
    per_program,
    splits,
    channels,
    plane,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Statistics (3, C) where a program has WHOLE channels; else (4, splits, C): pivot, offset, variance, count."""
    block, split, begin, end = program_range(steps, per_program, channels, BLOCK_C)
    before = positions_before(begin, plane, BLOCK_S)
    size = positions_before(end, plane, BLOCK_S) - before
    count = size.to(out.dtype.element_ty)

    # The pivot is the mean of the first tile, which is then read once more, from the cache. Every number is divided
    # before it is added: a sum of numbers near the largest float would overflow, and a pivot need not be exact.
    offsets, valid = tile(begin, block, channels, plane, ROWS, BLOCK_C, BLOCK_S)
    value = tl.load(x + offsets, mask=valid, other=0).to(count.dtype)
    samples = positions_before(begin + 1, plane, BLOCK_S) - before
    pivot = tl.sum(value * (1.0 / samples.to(count.dtype)), axis=1)
    total, squares = _around(x, pivot, begin, end, block, channels, plane, ROWS, BLOCK_C, BLOCK_S)
    offset = divide(total, count)

    # The subtraction costs log2(1 + offset² / variance) bits. With 16 that is 4 of 24; a pivot further off (an odd
    # first tile, or a constant channel whose pivot was rounded) is replaced by the mean itself, for a second look.
    # Squares beyond float32 have one too: of 1e38, constant, a rounded pivot is 1e31 away.
    variance = divide(squares, count) - offset * offset
    infinite = float("inf")
    huge = (squares == infinite) & (tl.abs(offset) < infinite)
    far = (offset * offset > 16 * variance) | huge
    if tl.max(far.to(tl.int32), axis=0) > 0:
        pivot += tl.where(far, offset, 0)  # other channels find the same as before, to the bit
        total, squares = _around(x, pivot, begin, end, block, channels, plane, ROWS, BLOCK_C, BLOCK_S)
        offset = divide(total, count)
        variance = divide(squares, count) - offset * offset
        huge = (squares == infinite) & (tl.abs(offset) < infinite)
    variance = tl.where(huge, infinite, variance)  # not inf - inf
    variance = tl.where(variance < 0, 0, variance)  # and NaN stays

    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    if WHOLE:
        _store_statistics(out, pivot, offset, variance, channels, c)
    else:
        stride = splits.to(tl.int64) * channels
        row = out + split.to(tl.int64) * channels + c
        tl.store(row, pivot, mask=c < channels)
        tl.store(row + stride, offset, mask=c < channels)
        tl.store(row + 2 * stride, variance, mask=c < channels)
        tl.store(row + 3 * stride, tl.zeros([BLOCK_C], count.dtype) + count, mask=c < channels)


@triton.jit
def _parts(partial, first, splits, whole, channels, c, BLOCK_P: tl.constexpr):
    """Rows of BLOCK_P splits in the first of four tables, which are there, and their shares of the `whole` count."""
    part = first + tl.arange(0, BLOCK_P)
    valid = (part < splits)[:, None] & (c < channels)[None, :]
    row = partial + part.to(tl.int64)[:, None] * channels + c[None, :]
    count = tl.load(row + 3 * splits.to(tl.int64) * channels, mask=valid, other=0)
    return row, valid, divide(count, whole)


@triton.jit(do_not_specialize=["splits", "count"])
def merge_moments(partial, statistics, splits, count, channels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Merge (4, splits, C) to statistics (3, C), all parts at once.

    With shares w = count_i / count (counts themselves would overflow): mean = Σ w mean_i and
    variance = Σ w (variance_i + (mean_i - mean)²). The means are taken relative to the mean of the pivots: a mean much
    larger than its standard deviation stays a pivot and an offset until the end.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    stride = splits.to(tl.int64) * channels
    zero = tl.zeros([BLOCK_P, BLOCK_C], dtype=statistics.dtype.element_ty)
    whole = zero + count

    pivot = tl.load(partial + c, mask=c < channels, other=0)
    pivots = zero
    for first in range(0, splits, BLOCK_P):
        row, valid, share = _parts(partial, first, splits, whole, channels, c, BLOCK_P)
        pivots += tl.where(valid, (tl.load(row, mask=valid, other=0) - pivot[None, :]) * share, 0)
    pivot += tl.sum(pivots, axis=0)  # exact if they are all the same, as in a constant channel

    offsets = zero
    for first in range(0, splits, BLOCK_P):
        row, valid, share = _parts(partial, first, splits, whole, channels, c, BLOCK_P)
        mean = (tl.load(row, mask=valid, other=0) - pivot[None, :]) + tl.load(row + stride, mask=valid, other=0)
        offsets += tl.where(valid, mean * share, 0)
    offset = tl.sum(offsets, axis=0)

    variances = zero
    for first in range(0, splits, BLOCK_P):
        row, valid, share = _parts(partial, first, splits, whole, channels, c, BLOCK_P)
        mean = (tl.load(row, mask=valid, other=0) - pivot[None, :]) + tl.load(row + stride, mask=valid, other=0)
        apart = mean - offset[None, :]
        within = tl.load(row + 2 * stride, mask=valid, other=0)
        variances += tl.where(valid, (within + apart * apart) * share, 0)
    _store_statistics(statistics, pivot, offset, tl.sum(variances, axis=0), channels, c)
