"""What batch normalization on the GPU does once per channel, between two passes over a tensor: one launch each.

As operations on vectors these would be a dozen launches. Everything is in float64, as on the CPU: vectors are thousands
of numbers where a tensor has millions, so that their time is a launch's even where float64 is slow.
"""

import triton
import triton.language as tl

from batchlab.kernels.batch_norm_triton_tiles import INVERSE, MEAN, REST, inverse_root, number

__all__ = ["settle", "settle_gradients"]


@triton.jit
def _store(numbers, row: tl.constexpr, value, c, channels):
    tl.store(numbers + row * channels + c, value.to(numbers.dtype.element_ty), mask=c < channels)


@triton.jit
def _move(running, value, momentum, c, channels):
    """The running statistic moves by `momentum` of the way to the batch's."""
    before = tl.load(running + c, mask=c < channels, other=0).to(tl.float64)
    after = before + momentum * (value - before)
    tl.store(running + c, after.to(running.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=["channels"])
def settle(
    mean,
    lost,
    variance,
    numbers,
    running_mean,
    running_var,
    batches,
    channels,
    eps: tl.float64,
    momentum: tl.float64,
    correction: tl.float64,
    BLOCK_C: tl.constexpr,
):
    """Store the table `numbers` (3, C), and move the running statistics and the number of batches where they are given.

    The mean is in one part or two (what its rounding `lost`); `correction` makes the variance unbiased.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < channels
    average = tl.load(mean + c, mask=valid, other=0).to(tl.float64)
    rest = tl.zeros([BLOCK_C], dtype=tl.float64)
    if lost is not None:
        rest = tl.load(lost + c, mask=valid, other=0).to(tl.float64)
    spread = tl.load(variance + c, mask=valid, other=1).to(tl.float64)
    if running_mean is not None:
        _move(running_mean, average + rest, momentum, c, channels)
    if running_var is not None:
        _move(running_var, spread * correction, momentum, c, channels)
    if batches is not None:  # noqa: SIM102  # known when this is compiled; which program it is, is not
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)

    high = average.to(numbers.dtype.element_ty)
    inverse = inverse_root(spread + eps)
    _store(numbers, MEAN, high, c, channels)
    _store(numbers, REST, ((average - high.to(tl.float64)) + rest) * inverse, c, channels)
    _store(numbers, INVERSE, inverse, c, channels)


@triton.jit(do_not_specialize=["channels"])
def settle_gradients(sums, numbers, of_weight, of_bias, factors, channels, count: tl.float64, BLOCK_C: tl.constexpr):
    """From Σ g and Σ g (x - rounded mean): gradients of weight and bias, and the `factors` (2, C) of the input's.

    Slope and level, so that the input's gradient is scale · (g - level - (x - rounded mean) · slope).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < channels
    one = tl.load(sums + c, mask=valid, other=0).to(tl.float64)
    two = tl.load(sums + channels + c, mask=valid, other=0).to(tl.float64)
    rest = number(numbers, REST, c, channels).to(tl.float64)
    inverse = number(numbers, INVERSE, c, channels).to(tl.float64)
    normalized = two * inverse - rest * one
    tl.store(of_weight + c, normalized.to(of_weight.dtype.element_ty), mask=valid)
    tl.store(of_bias + c, one.to(of_bias.dtype.element_ty), mask=valid)
    if factors is not None:
        _store(factors, 0, normalized * inverse / count, c, channels)
        _store(factors, 1, (one - rest * normalized) / count, c, channels)
