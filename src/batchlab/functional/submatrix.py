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
    "linear_of_kept",
    "select_features",
    "submatrix",
    "submatrix_conv",
    "submatrix_linear",
    "touched",
    "transformed",
]

ACCEPTS = "accepts_submatrix_gradient"
"""Name of the attribute by which an optimizer asks for a `SubmatrixGradient` on a parameter."""


def _gather(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if weight.ndim > 1 and kernels.submatrix.serves(weight):
        return kernels.submatrix.gather(weight, rows, columns)
    return reference.batchwise_dropout.submatrix(weight, rows, columns)


def _gradient(accepts: bool, block: Block, shape: torch.Size, strides: tuple[int, ...] | None = None) -> Tensor:
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
            block = _gradient(ctx.accepts[0], Block(ctx.rows, ctx.columns, block), ctx.shapes[0], ctx.strides)
        if bias is not None and ctx.rows is not None:
            bias = _gradient(ctx.accepts[1], Block(ctx.rows, None, bias), ctx.shapes[1])
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


def _check(x: Tensor, weight: Tensor, kept_inputs: Tensor | None, kept_outputs: Tensor | None, dim: int) -> None:
    _check_kept("kept_outputs", kept_outputs, weight.shape[0], weight)
    _check_kept("kept_inputs", kept_inputs, weight.shape[1], weight)
    expected = weight.shape[1] if kept_inputs is None else len(kept_inputs)
    if x.shape[dim] != expected:
        which = "inputs" if kept_inputs is None else "kept inputs"
        raise ValueError(
            f"input of shape {tuple(x.shape)} has {x.shape[dim]} features, but there are {expected} {which}: "
            "pass the compact input, with the kept features alone"
        )


def submatrix_linear(  # noqa: D417 - shapes say the rest
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    bias: Tensor | None = None,
    kept_inputs: Tensor | None = None,
    kept_outputs: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """The kept outputs of a linear layer, from the kept inputs.

    y = scale · x W[kept_outputs][:, kept_inputs]^T + b[kept_outputs]

    It equals the dense layer on an input with zeros at the dropped features, at the kept outputs; the work is the kept
    shares of inputs and outputs multiplied. Gradients of dropped rows, columns and biases are exactly zero.

    Shapes:
        input: (..., kept inputs), compact; result: (..., kept outputs).
        weight: (outputs, inputs); bias: (outputs,) or None.
        kept_inputs, kept_outputs: sorted int64 indices on the weight's device; None keeps all.

    Args:
        scale: multiplies the input, at no cost: the inverted form's 1/(1 - p) or n/k.

    Raises:
        ValueError: shapes that do not fit, or indices that are not sorted, distinct and in range.

    Source: Graham, Reizenstein & Robinson 2015, section 2.

    >>> W, x = torch.arange(6.0).view(2, 3), torch.ones(1, 2)
    >>> submatrix_linear(x, W, None, torch.tensor([0, 2]), torch.tensor([1]))       # 3 + 5
    tensor([[8.]])
    """
    _check(input, weight, kept_inputs, kept_outputs, -1)
    return linear_of_kept(input, weight, bias, kept_outputs, kept_inputs, scale)


class _SubmatrixLinear(torch.autograd.Function):
    """A linear layer on kept rows and columns, with a ReLU if asked: one node, two calls of a kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        scale: float,
        relu: bool,
        accepts: tuple[bool, bool],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        y, ctx.block = kernels.submatrix.linear_forward(x, weight, bias, rows, columns, scale, relu)
        ctx.rows, ctx.columns, ctx.scale, ctx.accepts = rows, columns, scale, accepts
        ctx.relu = relu
        ctx.save_for_backward(x, weight, bias, y if relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        if gradient is None:
            return (None,) * 8
        x, weight, bias, output = ctx.saved_tensors
        rows, columns, needed = ctx.rows, ctx.columns, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *_gradients_with_graph(ctx, x, weight, bias, gradient), None, None, None, None, None
        # An optimizer that asks for it multiplies the gradient out itself, where both factors are nobody else's:
        # what a ReLU's gradient is written to, and kept features that were picked out.
        lazy = needed[1] and ctx.accepts[0] and ctx.relu and columns is not None
        inputs, values, biases, left = kernels.submatrix.linear_backward(
            gradient.contiguous(), x, ctx.block, output, ctx.scale, (needed[0], needed[1] and not lazy, needed[2])
        )
        weights: Tensor | None = None
        if lazy:
            weights = SubmatrixGradient(weight.shape, [Block(rows, columns, None, (left, x, ctx.scale))])
        elif needed[1]:
            whole = rows is None and columns is None
            weights = values if whole else _gradient(ctx.accepts[0], Block(rows, columns, values), weight.shape)
        if needed[2] and rows is not None:
            biases = _gradient(ctx.accepts[1], Block(rows, None, biases), bias.shape)
        return inputs if needed[0] else None, weights, biases if needed[2] else None, None, None, None, None, None


def _gradients_with_graph(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor) -> Any:
    """The same gradients from plain operations, which can be differentiated again."""
    short = bias if bias is None or ctx.rows is None else bias.index_select(0, ctx.rows)
    y = _plain_linear(
        x, reference.batchwise_dropout.submatrix(weight, ctx.rows, ctx.columns), short, ctx.scale, ctx.relu
    )
    needed = ctx.needs_input_grad[:3]
    sources = [tensor for tensor, need in zip((x, weight, bias), needed, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad(y, sources, gradient, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _plain_linear(x: Tensor, block: Tensor, bias: Tensor | None, scale: float, relu: bool) -> Tensor:
    y = F.linear(x * scale if scale != 1 else x, block, bias)
    return F.relu(y) if relu else y


def linear_of_kept(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    scale: float = 1.0,
    relu: bool = False,
) -> Tensor:
    """`submatrix_linear` without its checks, and with a ReLU behind it if asked."""
    fast = (
        x.dtype == weight.dtype
        and not transformed()
        and kernels.submatrix.serves(weight)
        and (bias is None or bias.is_contiguous())
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )
    if not fast:
        return _plain_linear(x, *submatrix(weight, bias, rows, columns), scale, relu)
    accepts = (getattr(weight, ACCEPTS, False), getattr(bias, ACCEPTS, False))
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y: Tensor = _SubmatrixLinear.apply(flat, weight, bias, rows, columns, scale, relu, accepts)  # type: ignore[no-untyped-call]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


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
    _check(input, weight, kept_inputs, kept_outputs, 1 - weight.ndim)
    block, short = submatrix(weight, bias, kept_outputs, kept_inputs)
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return convolve(input, block * scale if scale != 1 else block, short, stride, padding, dilation)  # type: ignore[no-any-return]
