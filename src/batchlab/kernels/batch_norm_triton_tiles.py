"""How the GPU kernels of batch normalization cut x into tiles, and arithmetic that is exact enough per channel.

A tile is (BLOCK_C channels, BLOCK_S positions), in one of two layouts: planes (N, C, S), or rows (M, C) with the
channels innermost. Kernels walk by "steps": with planes a step is a piece of one sample's plane, with rows a group of
rows. A program has one block of channels and a range of steps.
"""

import triton
import triton.language as tl

__all__ = [
    "INVERSE",
    "MEAN",
    "REST",
    "divide",
    "inverse_root",
    "number",
    "positions_before",
    "program_range",
    "scale_and_shift",
    "tile",
]

# Rows of the table of numbers (3, C) that the forward pass leaves to the backward pass, as the CPU's kernels do.
MEAN = tl.constexpr(0)
REST = tl.constexpr(1)  # what the mean's rounding lost, in standard deviations: it may be less than the least float
INVERSE = tl.constexpr(2)  # 1 / √(variance + eps)


@triton.jit
def number(numbers, row: tl.constexpr, c, channels):
    """The channels `c` of a row of the table; 0 where there is no channel."""
    return tl.load(numbers + row * channels + c, mask=c < channels, other=0)


@triton.jit
def scale_and_shift(numbers, weight, bias, c, channels):
    """What (x - rounded mean) is multiplied by, and what is added to it then.

    Each pass finds them for itself, in the same way, as what a ReLU lets through is computed twice.
    """
    scale = number(numbers, INVERSE, c, channels)
    # x minus the rounded mean is exact or nearly so; what the mean has beyond it is taken off behind the scale.
    shift = -number(numbers, REST, c, channels).to(tl.float64)
    if weight is not None:
        factor = tl.load(weight + c, mask=c < channels, other=0)
        scale *= factor
        shift *= factor.to(tl.float64)
    if bias is not None:
        shift += tl.load(bias + c, mask=c < channels, other=0).to(tl.float64)
    return scale, shift.to(scale.dtype)


@triton.jit
def program_range(steps, per_program, channels, BLOCK_C: tl.constexpr):
    """Which block of channels, which split, and which steps this program has.

    Neighbouring programs have neighbouring channels of the same steps: what runs at the same time is near in memory.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    split = tl.program_id(0) // blocks
    begin = split * per_program
    return tl.program_id(0) % blocks, split, begin, tl.minimum(begin + per_program, steps)


@triton.jit
def tile(step, block, channels, plane, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Offsets (BLOCK_C, BLOCK_S) of a step's tile, and which of them are inside x.

    The start of a tile is computed once in int64, so that x may have more than 2³¹ numbers.
    """
    pieces = tl.cdiv(plane, BLOCK_S)
    sample = (step // pieces).to(tl.int64)
    start = (step % pieces).to(tl.int64) * BLOCK_S
    first = (block * BLOCK_C).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    if ROWS:
        offsets = (start * channels + first) + (s.to(tl.int64)[None, :] * channels + c[:, None])
    else:
        offsets = ((sample * channels + first) * plane + start) + (c.to(tl.int64)[:, None] * plane + s[None, :])
    return offsets, (first + c < channels)[:, None] & (start + s < plane)[None, :]


@triton.jit
def positions_before(step, plane, BLOCK_S: tl.constexpr):
    """How many positions per channel the steps before `step` have."""
    pieces = tl.cdiv(plane, BLOCK_S)
    return (step // pieces).to(tl.int64) * plane + (step % pieces).to(tl.int64) * BLOCK_S


@triton.jit
def divide(a, b):
    """Return a / b, correctly rounded (`/` is not, in float32). For numbers per channel, not per sample."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def inverse_root(a):
    """Return 1 / √a, both steps correctly rounded."""
    if a.dtype == tl.float64:
        return 1 / tl.sqrt(a)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(a))
