"""Normalization, activation and their gradients on the GPU, with given statistics.

Bytes, each tensor once: `apply` reads x (and the residual) and writes y; `gradient_sums` reads the gradient and x (and
the output or the residual); `input_gradient` reads the same again and writes one or two. `pre`, what the activation is
applied to, is computed again rather than kept: six flops instead of writing and reading a tensor.
"""

import triton
import triton.language as tl

from batchlab.kernels.batch_norm_triton_tiles import MEAN, number, program_range, scale_and_shift, tile

__all__ = ["apply", "gradient_sums", "input_gradient", "merge_sums"]

LEAKY_SLOPE = tl.constexpr(0.01)


@triton.jit
def _activate(pre, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(pre <= 0, 0, pre)  # NaN passes, as in torch
    elif ACTIVATION == "leaky_relu":
        return tl.where(pre > 0, pre, pre * LEAKY_SLOPE)
    elif ACTIVATION == "silu":
        return pre / (1 + tl.exp(-pre))
    elif ACTIVATION == "sigmoid":
        return 1 / (1 + tl.exp(-pre))
    else:
        tl.static_assert(ACTIVATION is None, "the activation has no kernel")
        return pre


@triton.jit
def _behind(g, pre, y, ACTIVATION: tl.constexpr):
    """Return g · activation'(pre), from the activation's input or, where that is enough, its output."""
    if ACTIVATION == "relu":
        return tl.where(y <= 0, 0, g)
    elif ACTIVATION == "leaky_relu":
        return tl.where(y > 0, g, g * LEAKY_SLOPE)
    elif ACTIVATION == "silu":
        gate = 1 / (1 + tl.exp(-pre))
        return g * (gate * (1 + pre * (1 - gate)))
    else:
        return g * (1 - y) * y


@triton.jit(do_not_specialize=["steps", "per_program", "size"])
def apply(
    x,
    y,
    residual,
    numbers,
    weight,
    bias,
    steps,
    per_program,
    size,  # noqa: ARG001  # read by the tuner alone
    channels,
    plane,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Store y = activation((x - mean) · scale + shift + residual)."""
    block, _, begin, end = program_range(steps, per_program, channels, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = number(numbers, MEAN, c, channels)
    scale, shift = scale_and_shift(numbers, weight, bias, c, channels)
    for step in range(begin, end):
        offsets, valid = tile(step, block, channels, plane, ROWS, BLOCK_C, BLOCK_S)
        value = tl.load(x + offsets, mask=valid, other=0).to(mean.dtype)
        pre = tl.fma(value - mean[:, None], scale[:, None], shift[:, None])
        if residual is not None:
            pre += tl.load(residual + offsets, mask=valid, other=0).to(mean.dtype)
        tl.store(y + offsets, _activate(pre, ACTIVATION).to(y.dtype.element_ty), mask=valid)


@triton.jit
def _gradient(grad, centred, output, residual, scale, shift, offsets, valid, ACTIVATION: tl.constexpr):
    """The gradient behind the activation: grad · activation'(pre); 0 outside of x."""
    g = tl.load(grad + offsets, mask=valid, other=0).to(centred.dtype)
    if ACTIVATION is not None:
        if output is not None:
            y = tl.load(output + offsets, mask=valid, other=0).to(centred.dtype)
            g = _behind(g, y, y, ACTIVATION)
        else:
            pre = tl.fma(centred, scale[:, None], shift[:, None])
            if residual is not None:
                pre += tl.load(residual + offsets, mask=valid, other=0).to(centred.dtype)
            g = _behind(g, pre, _activate(pre, ACTIVATION), ACTIVATION)
    return tl.where(valid, g, 0)  # the derivative may be NaN where there is no x


@triton.jit(do_not_specialize=["steps", "per_program", "splits"])
def gradient_sums(
    grad,
    x,
    output,
    residual,
    numbers,
    weight,
    bias,
    out,
    steps,
    per_program,
    splits,
    channels,
    plane,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Σ g and Σ g · (x - rounded mean) of every split and channel, (2, splits, C)."""
    block, split, begin, end = program_range(steps, per_program, channels, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = number(numbers, MEAN, c, channels)
    scale, shift = scale_and_shift(numbers, weight, bias, c, channels)
    total = tl.zeros([BLOCK_C, BLOCK_S], dtype=mean.dtype)
    products = tl.zeros([BLOCK_C, BLOCK_S], dtype=mean.dtype)
    for step in range(begin, end):
        offsets, valid = tile(step, block, channels, plane, ROWS, BLOCK_C, BLOCK_S)
        centred = tl.load(x + offsets, mask=valid, other=0).to(mean.dtype) - mean[:, None]
        g = _gradient(grad, centred, output, residual, scale, shift, offsets, valid, ACTIVATION)
        total += g
        products += g * centred
    row = out + split.to(tl.int64) * channels + c
    tl.store(row, tl.sum(total, axis=1), mask=c < channels)
    tl.store(row + splits.to(tl.int64) * channels, tl.sum(products, axis=1), mask=c < channels)


@triton.jit(do_not_specialize=["splits"])
def merge_sums(partial, sums, splits, channels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Add (2, splits, C) to (2, C); program (block, which sum)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(1)
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=sums.dtype.element_ty)
    for first in range(0, splits, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        valid = (part < splits)[:, None] & (c < channels)[None, :]
        row = (which.to(tl.int64) * splits + part)[:, None] * channels + c[None, :]
        total += tl.load(partial + row, mask=valid, other=0)
    tl.store(sums + which * channels + c, tl.sum(total, axis=0), mask=c < channels)


@triton.jit(do_not_specialize=["steps", "per_program", "size"])
def input_gradient(
    grad,
    x,
    output,
    residual,
    numbers,
    weight,
    bias,
    factors,
    grad_x,
    grad_residual,
    steps,
    per_program,
    size,  # noqa: ARG001  # read by the tuner alone
    channels,
    plane,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Store scale · (g - level - (x - rounded mean) · slope), and g for the residual.

    Without factors, scale · g: nothing of an infinite x with given statistics.
    """
    block, _, begin, end = program_range(steps, per_program, channels, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = number(numbers, MEAN, c, channels)
    scale, shift = scale_and_shift(numbers, weight, bias, c, channels)
    if factors is not None:
        slope = number(factors, 0, c, channels)
        level = number(factors, 1, c, channels)
    for step in range(begin, end):
        offsets, valid = tile(step, block, channels, plane, ROWS, BLOCK_C, BLOCK_S)
        centred = tl.load(x + offsets, mask=valid, other=0).to(mean.dtype) - mean[:, None]
        g = _gradient(grad, centred, output, residual, scale, shift, offsets, valid, ACTIVATION)
        if grad_residual is not None:
            tl.store(grad_residual + offsets, g.to(grad_residual.dtype.element_ty), mask=valid)
        gradient = g
        if factors is not None:
            gradient = tl.fma(-centred, slope[:, None], g - level[:, None])
        gradient *= scale[:, None]
        tl.store(grad_x + offsets, gradient.to(grad_x.dtype.element_ty), mask=valid)
