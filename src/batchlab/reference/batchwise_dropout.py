"""Batchwise dropout, formula first (Graham, Reizenstein & Robinson 2015, arXiv 1502.02478, sections 1 and 2).

One pattern d of kept features serves the whole batch. With x^drop = x[:, d_k] and W^drop = W[d_{k+1}, d_k]
(torch's weights are outputs x inputs):

    y^drop = x^drop W^drop^T        dW^drop = dy^drop^T x^drop        dx^drop = dy^drop W^drop

which is (1 - p_k)(1 - p_{k+1}) of the multiplications of the dense network with masked activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expand", "mask", "momentum_step", "scatter", "submatrix"]


def submatrix(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """weight[rows][:, columns] by index_select, which is many times faster than indexing; None keeps all."""
    if rows is not None:
        weight = weight.index_select(0, rows)
    return weight if columns is None else weight.index_select(1, columns)


def scatter(block: Tensor, rows: Tensor | None, columns: Tensor | None, shape: torch.Size) -> Tensor:
    """A tensor of `shape` that has `block` in its kept rows and columns, and exact zeros elsewhere."""
    if columns is not None:
        wide = block.new_zeros((block.shape[0], *shape[1:]))
        block = wide.index_copy(1, columns, block)
    if rows is not None:
        block = block.new_zeros(shape).index_copy(0, rows, block)
    return block


def expand(x: Tensor, kept: Tensor, num_features: int, dim: int) -> Tensor:
    """Put the kept features back among zeros: the masked form of a compact activation."""
    shape = list(x.shape)
    shape[dim] = num_features
    return x.new_zeros(shape).index_copy(dim, kept, x)


def mask(kept: Tensor, num_features: int, scale: float, like: Tensor) -> Tensor:
    """A vector of `num_features`: `scale` where kept, 0 elsewhere; of `like`'s dtype and device."""
    return like.new_zeros(num_features).index_fill(0, kept, scale)


def momentum_step(
    weight: Tensor,
    velocity: Tensor | None,
    gradient: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    rate: float,
    momentum: float,
    decay: float,
    nesterov: bool,
) -> None:
    """Torch's SGD on the kept rows and columns alone, in place.

    g = gradient + decay · w;   v = momentum · v + g;   w = w - rate · (g + momentum · v if nesterov else v)
    """

    def write(target: Tensor, block: Tensor) -> None:
        if columns is None:
            target.copy_(block) if rows is None else target.index_copy_(0, rows, block)
        else:
            # Whole rows are taken out, changed in their kept columns, and put back.
            kept_rows = target if rows is None else target.index_select(0, rows)
            changed = kept_rows.index_copy(1, columns, block)
            target.copy_(changed) if rows is None else target.index_copy_(0, rows, changed)

    w = submatrix(weight, rows, columns)
    g = gradient + decay * w if decay else gradient
    direction = g
    if velocity is not None:
        v = momentum * submatrix(velocity, rows, columns) + g
        direction = g + momentum * v if nesterov else v
        write(velocity, v)
    write(weight, w - rate * direction)
