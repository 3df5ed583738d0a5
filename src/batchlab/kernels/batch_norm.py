"""Batch norm with its residual and its activation, two passes over memory forward and two backward, on the CPU.

Bytes, with s the size of the input: forward reads s, reads it again (from the cache, where a tile of channels fits),
and writes s; backward reads the gradient and the input, both again, and writes s. The limit is 2 s forward and 3 s
backward, two and a half copies. Saved are the input (and the output or the residual, where there is a residual and an
activation) and six numbers a channel.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from batchlab.kernels.build import build, load
from batchlab.kernels.source import Source

__all__ = ["ACTIVATIONS", "available", "backward", "evaluate", "forward", "is_dense", "release_memory"]

DTYPES: Final = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
ACTIVATIONS: Final[dict[str | None, int]] = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "sigmoid": 4}
SOURCE: Final = Source(Path(__file__).with_name("batch_norm.cpp"))


@cache
def available() -> bool:
    """Whether the compiled kernels are loaded; tries to build them once, and warns once if that fails."""
    try:
        load(build(SOURCE))
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"batchlab: {error}. Batch norm takes PyTorch's own operations instead: right, but slower. Install a C++ "
            "compiler, or set CXX to one.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def is_dense(x: Tensor) -> bool:
    """Whether the kernels take these strides: contiguous, or channels innermost and the rest contiguous."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """The output, and (6, C): mean, what its rounding lost, 1/√(var + eps), scale, shift, biased variance.

    Running statistics move in place and the number of batches grows by one, where they are given and a channel has two
    values or more. `x` is dense (`is_dense`), `residual` has its shape, dtype and strides; vectors of channels are
    contiguous, in float32 (float64 for such an x).
    """
    found: tuple[Tensor, Tensor] = torch.ops.batchlab_batch_norm.forward_.default(
        x, weight, bias, residual, running_mean, running_var, num_batches_tracked, momentum, eps, activation
    )
    return found


def evaluate(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    """The output with given statistics; the arguments are those of `forward`."""
    return torch.ops.batchlab_batch_norm.evaluate.default(  # type: ignore[no-any-return]
        x, mean, variance, weight, bias, residual, eps, activation
    )


def backward(
    gradient: Tensor,
    x: Tensor,
    output: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    activation: int,
    residual_needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input and residual, and (2, C) those of weight and bias.

    With a residual behind an activation, what went into that is found from the `output` (a (leaky) ReLU, a sigmoid),
    or from the `residual` (SiLU). The residual's gradient is empty where it is not needed, or is `gradient` itself:
    without an activation.
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.batchlab_batch_norm.backward.default(
        gradient, x, output, residual, saved, activation, residual_needed
    )
    return found


def release_memory() -> int:
    """Give the memory that waits for the next results back to the system; returns its bytes."""
    if not hasattr(torch.ops.batchlab_batch_norm, "release_memory"):
        return 0  # not in use yet: nothing waits, and nothing is compiled to say so
    return int(torch.ops.batchlab_batch_norm.release_memory.default())
