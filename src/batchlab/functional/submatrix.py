"""Linear and convolution layers on the kept rows and columns of their weights (Graham et al. 2015, section 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from batchlab import kernels, reference
from batchlab.functional.submatrix_gradient import Block, SubmatrixGradient, scatter

__all__ = [
    "ACCEPTS",
    "select_features",
    "submatrix",
    "submatrix_conv",
    "touched",
    "transformed",
]

ACCEPTS = "accepts_submatrix_gradient"
"""Name of the attribute by which an optimizer asks for a `SubmatrixGradient` on a parameter."""


def _gather(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if weight.ndim > 1 and kernels.submatrix.serves(weight):
        return kernels.submatrix.gather(weight, rows, columns)
    return reference.batchwise_dropout.submatrix(weight, rows, columns)


def block_gradient(accepts: bool, block: Block, shape: torch.Size, strides: tuple[int, ...] | None = None) -> Tensor:
    if accepts and not torch.is_grad_enabled():
        return SubmatrixGradient(shape, [block], strides=strides)
    return scatter(block, shape)


class _Submatrix(torch.autograd.Function):
    """Kept rows and columns of a weight, and kept entries of its bias."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        accepts: tuple[bool, bool],
    ) -> Any:
        ctx.rows, ctx.columns, ctx.accepts = rows, columns, accepts
        ctx.shapes = weight.shape, None if bias is None else bias.shape
        ctx.strides = None if weight.is_contiguous() else weight.stride()
        ctx.set_materialize_grads(False)
        block = _gather(weight, rows, columns)
        if bias is None:
            return block, None
        return block, bias.view_as(bias) if rows is None else bias.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        block, bias = gradients
        if block is not None:
            block = block_gradient(ctx.accepts[0], Block(ctx.rows, ctx.columns, block), ctx.shapes[0], ctx.strides)
        if bias is not None and ctx.rows is not None:
            bias = block_gradient(ctx.accepts[1], Block(ctx.rows, None, bias), ctx.shapes[1])
        return block, bias, None, None, None


def transformed() -> bool:
    """Whether a compiler, torch.func or forward differentiation watches: they see through plain operations alone."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def submatrix(
    weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """weight[rows][:, columns] and bias[rows], differentiable; gradients of all other entries are exactly zero.

    Shapes:
        weight: (outputs, inputs, ...); bias: (outputs,) or None.
        rows: kept outputs, columns: kept inputs; sorted int64, or None for all.

    >>> W, b = torch.arange(6.0).view(2, 3), torch.zeros(2)
    >>> submatrix(W, b, torch.tensor([1]), torch.tensor([0, 2]))
    (tensor([[3., 5.]]), tensor([0.]))
    """
    if rows is None and columns is None:
        return weight, bias
    if transformed():
        short = bias if bias is None or rows is None else bias.index_select(0, rows)
        return reference.batchwise_dropout.submatrix(weight, rows, columns), short
    accepts = (getattr(weight, ACCEPTS, False), getattr(bias, ACCEPTS, False))
    block, short = _Submatrix.apply(weight, bias, rows, columns, accepts)  # type: ignore[no-untyped-call]
    return block, short


class _Touched(torch.autograd.Function):
    """A weight and its bias as they are, whose gradients are known to be zero outside of kept rows and columns."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        accepts: tuple[bool, bool],
    ) -> Any:
        ctx.rows, ctx.columns, ctx.accepts = rows, columns, accepts
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, bias = gradients
        if torch.is_grad_enabled():
            return weight, bias, None, None, None
        if weight is not None and ctx.accepts[0]:
            block = Block(ctx.rows, ctx.columns, _gather(weight.contiguous(), ctx.rows, ctx.columns))
            weight = SubmatrixGradient(weight.shape, [block], strides=weight.stride())
        if bias is not None and ctx.accepts[1] and ctx.rows is not None:
            bias = SubmatrixGradient(bias.shape, [Block(ctx.rows, None, bias.index_select(0, ctx.rows))])
        return weight, bias, None, None, None


def touched(
    weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The whole weight and bias; where an optimizer asks, their gradient says which rows and columns took part."""
    accepts = (bool(getattr(weight, ACCEPTS, False)), bool(getattr(bias, ACCEPTS, False)))
    if (rows is None and columns is None) or not any(accepts) or transformed():
        return weight, bias
    return _Touched.apply(weight, bias, rows, columns, accepts)  # type: ignore[no-untyped-call, no-any-return]


def _check_kept(name: str, kept: Tensor | None, num_features: int, weight: Tensor) -> None:
    if kept is None:
        return
    if kept.dtype != torch.int64 or kept.ndim != 1 or kept.device != weight.device:
        raise ValueError(
            f"{name} is {kept.dtype} of shape {tuple(kept.shape)} on {kept.device}; it must be an int64 vector of "
            f"indices on the weight's device, {weight.device}"
        )
    if kept.device.type != "cpu" or transformed() or not kept.numel():
        return  # to look at them would wait for the device, or break the graph
    if not bool((kept[1:] > kept[:-1]).all()) or int(kept[0]) < 0 or int(kept[-1]) >= num_features:
        raise ValueError(f"{name} must be sorted and distinct, from 0 to {num_features - 1}; draw_pattern returns such")


def check_compact(x: Tensor, weight: Tensor, kept_inputs: Tensor | None, kept_outputs: Tensor | None, dim: int) -> None:
    _check_kept("kept_outputs", kept_outputs, weight.shape[0], weight)
    _check_kept("kept_inputs", kept_inputs, weight.shape[1], weight)
    expected = weight.shape[1] if kept_inputs is None else len(kept_inputs)
    if x.shape[dim] != expected:
        which = "inputs" if kept_inputs is None else "kept inputs"
        raise ValueError(
            f"input of shape {tuple(x.shape)} has {x.shape[dim]} features, but there are {expected} {which}: "
            "pass the compact input, with the kept features alone"
        )


def select_features(x: Tensor, kept: Tensor, dim: int) -> Tensor:
    """The kept features of an activation."""
    plain = x.requires_grad or x.ndim != 2 or dim != 1 or transformed()
    if plain or not kernels.submatrix.serves(x):
        return x.index_select(dim, kept)
    return kernels.submatrix.gather(x, None, kept)


def submatrix_conv(
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    bias: Tensor | None = None,
    kept_inputs: Tensor | None = None,
    kept_outputs: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    scale: float = 1.0,
) -> Tensor:
    """The kept feature maps of a convolution, from the kept input maps; in one, two or three dimensions.

    y = conv(scale · x, W[kept_outputs][:, kept_inputs]) + b[kept_outputs]

    Everything else is `submatrix_linear`'s; groups are not possible.

    Shapes:
        input: (N, kept inputs, *spatial) or without N; result: (N, kept outputs, *spatial).
        weight: (outputs, inputs, *kernel).

    Raises:
        ValueError: as `submatrix_linear`, or a weight without one to three spatial dimensions.

    Source: Graham, Reizenstein & Robinson 2015, section 2 (convolutional networks).

    >>> W = torch.ones(4, 3, 2, 2)
    >>> submatrix_conv(torch.ones(1, 2, 5, 5), W, None, torch.tensor([0, 2]), torch.tensor([1, 2, 3])).shape
    torch.Size([1, 3, 4, 4])
    """
    if not 3 <= weight.ndim <= 5:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; a convolution's is (outputs, inputs, *kernel)")
    check_compact(input, weight, kept_inputs, kept_outputs, 1 - weight.ndim)
    block, short = submatrix(weight, bias, kept_outputs, kept_inputs)
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return convolve(input, block * scale if scale != 1 else block, short, stride, padding, dilation)  # type: ignore[no-any-return]
