"""Kept rows and columns of a matrix: gather, scatter and momentum step, each in one pass over memory, on the CPU.

Bytes, for k of n kept in rows and columns, four bytes a number: a cache line of a row holds sixteen numbers, so all
lines of the k kept rows are touched, n/k times what a dense block of the same size would need. Gather reads k·n and
writes k·k; the momentum step reads k·k and reads and writes 2·k·n.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from batchlab.kernels.build import build, load
from batchlab.kernels.source import Source

__all__ = [
    "available",
    "draw",
    "gather",
    "linear_backward",
    "linear_forward",
    "momentum_step",
    "release_memory",
    "scatter",
    "serves",
    "sorted_first",
]

DTYPES: Final = frozenset({torch.float32, torch.float64})
SOURCE: Final = Source(Path(__file__).with_name("submatrix.cpp"))


@cache
def available() -> bool:
    """Whether the compiled kernels are loaded; tries to build them once, and warns once if that fails."""
    try:
        load(build(SOURCE))
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"batchlab: {error}. Submatrices take PyTorch's own operations instead: right, but slower. Install a C++ "
            "compiler, or set CXX to one.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def serves(weight: Tensor) -> bool:
    """Whether the kernels take this weight: on the CPU, contiguous, float32 or float64."""
    return weight.is_cpu and weight.dtype in DTYPES and weight.is_contiguous() and available()


def gather(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """weight[rows][:, columns], contiguous; None keeps all."""
    return torch.ops.batchlab_submatrix.gather.default(weight, rows, columns)  # type: ignore[no-any-return]


def scatter(block: Tensor, rows: Tensor | None, columns: Tensor | None, shape: torch.Size) -> Tensor:
    """A tensor of `shape` that has `block` in its kept rows and columns, and zeros elsewhere."""
    full: Tensor = torch.ops.batchlab_submatrix.scatter.default(
        block.contiguous(), rows, columns, shape[0], shape[1], math.prod(shape[2:])
    )
    return full.view(shape)


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    scale: float,
    relu: bool,
    block_needed: bool = True,
) -> tuple[Tensor, Tensor]:
    """relu(scale · x block^T + bias[rows]) for a compact x (samples, kept inputs), and the block.

    The block is weight[rows][:, columns], for `linear_backward`; without rows if it is not needed there.
    """
    found: tuple[Tensor, Tensor] = torch.ops.batchlab_submatrix.linear_forward.default(
        x, weight, bias, rows, columns, scale, relu, block_needed
    )
    return found


def linear_backward(
    gradient: Tensor, x: Tensor, block: Tensor, output: Tensor | None, scale: float, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, block and kept biases, empty where not `needed`, and that of the product's result.

    With the `output` of a ReLU the last one is behind it, in memory of its own; else it is the given one.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.batchlab_submatrix.linear_backward.default(
        gradient, x, block, output, scale, *needed
    )
    return found


def release_memory() -> int:
    """Give the memory that waits for the next batch's blocks back to the system; returns its bytes."""
    if not hasattr(torch.ops.batchlab_submatrix, "release_memory"):
        return 0  # not in use yet: nothing waits, and nothing is compiled to say so
    return int(torch.ops.batchlab_submatrix.release_memory.default())


def momentum_step(
    weights: Sequence[Tensor],
    velocities: Sequence[Tensor],
    gradients: Sequence[Tensor],
    right: Sequence[Tensor | None],
    scales: Sequence[float],
    rows: Sequence[Tensor | None],
    columns: Sequence[Tensor | None],
    rate: float,
    momentum: float,
    decay: float,
    nesterov: bool,
) -> None:
    """A step of gradient descent on kept rows and columns of each weight and velocity (none: no momentum), in place.

    A vector among the weights has kept rows alone. Where there is a `right` factor, the gradient is
    scale · gradient^T right: it is computed tile by tile and used in the cache.
    """
    torch.ops.batchlab_submatrix.momentum_step.default(
        weights, velocities, gradients, right, scales, rows, columns, rate, momentum, decay, nesterov
    )


def sorted_first(order: Tensor, count: int) -> Tensor:
    """The first `count` entries of a permutation, sorted."""
    return torch.ops.batchlab_submatrix.sorted_first.default(order, count)  # type: ignore[no-any-return]


def draw(sizes: Sequence[int], counts: Sequence[int]) -> list[Tensor]:
    """`sorted_first(torch.randperm(size), count)` for each size and count, in one call."""
    return torch.ops.batchlab_submatrix.draw.default(sizes, counts)  # type: ignore[no-any-return]
