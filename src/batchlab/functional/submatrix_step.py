"""A step of gradient descent with momentum that touches the kept rows and columns alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchlab import kernels, reference
from batchlab.functional.submatrix_gradient import Block, SubmatrixGradient

__all__ = ["momentum_step"]


def _took_part(gradient: SubmatrixGradient) -> Tensor:
    """Which entries any of the blocks kept."""
    kept = torch.zeros(gradient.shape, dtype=torch.bool, device=gradient.device)
    for block in gradient.blocks:
        ones = SubmatrixGradient(gradient.shape, [block.with_values(torch.ones_like(block.values))])
        kept |= ones.to_dense() != 0
    return kept


def _step_one(
    weight: Tensor,
    velocity: Tensor | None,
    block: Block,
    rate: float,
    momentum: float,
    decay: float,
    nesterov: bool,
) -> None:
    rows, columns, gradient = block.rows, block.columns, block.values
    if weight.ndim < 2:
        # A vector is one row, whose kept entries are its columns.
        weight, gradient = weight.view(1, -1), gradient.view(1, -1)
        velocity = None if velocity is None else velocity.view(1, -1)
        rows, columns = None, rows
    step = reference.batchwise_dropout.momentum_step
    step(weight, velocity, gradient, rows, columns, rate, momentum, decay, nesterov)


def _step_overlapping(
    weight: Tensor,
    velocity: Tensor | None,
    gradient: SubmatrixGradient,
    rate: float,
    momentum: float,
    decay: float,
    nesterov: bool,
) -> None:
    """Several batches' blocks: their sum is dense, and what any of them kept is changed."""
    kept = _took_part(gradient)
    old_weight, old_velocity = weight.clone(), None if velocity is None else velocity.clone()
    _step_one(weight, velocity, Block(None, None, gradient.to_dense()), rate, momentum, decay, nesterov)
    weight.copy_(torch.where(kept, weight, old_weight))
    if velocity is not None and old_velocity is not None:
        velocity.copy_(torch.where(kept, velocity, old_velocity))


def momentum_step(
    weights: Sequence[Tensor],
    velocities: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rate: float,
    momentum: float,
    decay: float,
    nesterov: bool,
) -> None:
    """Torch's SGD step, in place; where a gradient is a `SubmatrixGradient`, on the entries that took part alone.

    g = gradient + decay · w;   v = momentum · v + g;   w = w - rate · (g + momentum · v if nesterov else v)

    Args:
        weights: changed in place.
        velocities: v of each, changed in place; empty without momentum.
        gradients: of each, dense or a `SubmatrixGradient`.
        rate: the learning rate.
        momentum: share of v that is kept.
        decay: the weight decay.
        nesterov: look ahead along v.
    """
    fast = _Lists()
    for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        velocity = velocities[index] if velocities else None
        if type(gradient) is SubmatrixGradient:
            blocks = gradient.blocks
            if len(blocks) != 1:
                if blocks:
                    _step_overlapping(weight, velocity, gradient, rate, momentum, decay, nesterov)
                continue
            block = blocks[0]
        else:
            block = Block(None, None, gradient)
        if not fast.take(weight, velocity, block):
            _step_one(weight, velocity, block, rate, momentum, decay, nesterov)
    if fast.weights:
        kernels.submatrix.momentum_step(
            fast.weights,
            fast.velocities,
            fast.gradients,
            fast.right,
            fast.scales,
            fast.rows,
            fast.columns,
            rate,
            momentum,
            decay,
            nesterov,
        )
        torch.autograd.graph.increment_version(fast.weights)  # a backward through old weights is refused, as after SGD


class _Lists:
    """What the kernel does in one call."""

    __slots__ = ("columns", "gradients", "right", "rows", "scales", "velocities", "weights")

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.velocities: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.right: list[Tensor | None] = []
        self.scales: list[float] = []
        self.rows: list[Tensor | None] = []
        self.columns: list[Tensor | None] = []

    def take(self, weight: Tensor, velocity: Tensor | None, block: Block) -> bool:
        """Add one weight's step, if the kernel can do it."""
        dtype = weight.dtype
        if not kernels.submatrix.serves(weight) or weight.ndim == 0:
            return False
        if velocity is not None and not (velocity.dtype == dtype and velocity.is_contiguous()):
            return False
        if block.factors is not None:
            left, right, scale = block.factors
        else:
            left, right, scale = block.values.contiguous(), None, 1.0
        if left.dtype != dtype:
            return False
        self.weights.append(weight)
        if velocity is not None:
            self.velocities.append(velocity)
        self.gradients.append(left)
        self.right.append(right)
        self.scales.append(scale)
        self.rows.append(block.rows)
        self.columns.append(block.columns)
        return True
