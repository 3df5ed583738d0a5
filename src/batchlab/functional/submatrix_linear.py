"""Linear layers on the kept rows and columns of their weights (Graham et al. 2015, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab import kernels, reference
from batchlab.functional.submatrix import ACCEPTS, block_gradient, check_compact, submatrix, transformed
from batchlab.functional.submatrix_gradient import Block, SubmatrixGradient

__all__ = ["KeptLinear", "chain_of_kept", "submatrix_linear"]


class KeptLinear(NamedTuple):
    """A linear layer on kept rows and columns, and a ReLU behind it if asked.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,) or None.
        rows: kept outputs, or None.
        columns: kept inputs, or None.
        scale: of the input.
        relu: whether a ReLU follows.
    """

    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    scale: float = 1.0
    relu: bool = False


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
    check_compact(input, weight, kept_inputs, kept_outputs, -1)
    return chain_of_kept(input, [KeptLinear(weight, bias, kept_outputs, kept_inputs, scale)])


def _plain(x: Tensor, layer: KeptLinear, block: Tensor, bias: Tensor | None) -> Tensor:
    y = F.linear(x * layer.scale if layer.scale != 1 else x, block, bias)
    return F.relu(y) if layer.relu else y


class _Chain(torch.autograd.Function):
    """Linear layers, one behind the other, in one node: two calls of a kernel for each.

    For small networks a node and its Python cost more than the layer's arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, layers: Sequence[KeptLinear], x: Tensor, *_: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layers = [(layer.rows, layer.columns, layer.scale, layer.relu) for layer in layers]
        ctx.accepts = [(getattr(w, ACCEPTS, False), getattr(b, ACCEPTS, False)) for w, b, *_ in layers]
        ctx.blocks = []
        saved: list[Tensor | None] = [x]
        needed = ctx.needs_input_grad
        for index, (weight, bias, rows, columns, scale, relu) in enumerate(layers):
            # Backward, a block is needed where gradients go on to what is in front of it.
            below = True in needed[1 : 2 + 2 * index]
            x, block = kernels.submatrix.linear_forward(x, weight, bias, rows, columns, scale, relu, below)
            ctx.blocks.append(block)
            saved += (weight, bias, x)
        if not layers[-1].relu:
            saved[-1] = None  # nobody needs the last output
        ctx.save_for_backward(*saved)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        needed = ctx.needs_input_grad
        if gradient is None:
            return (None,) * len(needed)
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradients_with_graph(ctx, saved, gradient)
        found: list[Tensor | None] = [None] * len(needed)
        gradient = gradient.contiguous()
        for index in range(len(ctx.layers) - 1, -1, -1):
            rows, columns, scale, relu = ctx.layers[index]
            x, weight, bias, output = saved[3 * index : 3 * index + 4]
            place = 2 + 2 * index  # of this layer's weight among the arguments
            below = True in needed[1:place]
            # An optimizer that asks for it multiplies the gradient out itself, where both factors are nobody else's:
            # what a ReLU's gradient is written to, and kept features that were picked out.
            accepts = ctx.accepts[index]
            lazy = needed[place] and accepts[0] and relu and columns is not None
            wants = (below, needed[place] and not lazy, needed[place + 1])
            inputs, values, biases, left = kernels.submatrix.linear_backward(
                gradient, x, ctx.blocks[index], output if relu else None, scale, wants
            )
            if lazy:
                found[place] = SubmatrixGradient(weight.shape, [Block(rows, columns, None, (left, x, scale))])
            elif needed[place]:
                whole = rows is None and columns is None
                found[place] = (
                    values if whole else block_gradient(accepts[0], Block(rows, columns, values), weight.shape)
                )
            if needed[place + 1]:
                found[place + 1] = (
                    biases if rows is None else block_gradient(accepts[1], Block(rows, None, biases), bias.shape)
                )
            if not below:
                break
            gradient = inputs
        if needed[1]:
            found[1] = gradient
        return tuple(found)


def _gradients_with_graph(ctx: Any, saved: Sequence[Any], gradient: Tensor) -> Any:
    """The same gradients from plain operations, which can be differentiated again."""
    y, sources = saved[0], [saved[0]]
    for index, (rows, columns, scale, relu) in enumerate(ctx.layers):
        weight, bias = saved[3 * index + 1 : 3 * index + 3]
        sources += (weight, bias)
        short = bias if bias is None or rows is None else bias.index_select(0, rows)
        block = reference.batchwise_dropout.submatrix(weight, rows, columns)
        y = _plain(y, KeptLinear(weight, bias, rows, columns, scale, relu), block, short)
    needed = ctx.needs_input_grad[1:]
    wanted = [source for source, need in zip(sources, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
    return None, *(next(found) if need else None for need in needed)


def _served(x: Tensor, layers: Sequence[KeptLinear]) -> bool:
    """Whether the kernels can do it."""
    dtype = x.dtype
    if not x.numel() or transformed() or torch.is_autocast_enabled("cpu"):
        return False
    for weight, bias, *_ in layers:
        if weight.dtype != dtype or not kernels.submatrix.serves(weight):
            return False
        if bias is not None and not (bias.dtype == dtype and bias.is_contiguous()):
            return False
    return True


def chain_of_kept(x: Tensor, layers: Sequence[KeptLinear]) -> Tensor:
    """Linear layers one behind the other, on compact features, without `submatrix_linear`'s checks."""
    if not _served(x, layers):
        for layer in layers:
            x = _plain(x, layer, *submatrix(layer.weight, layer.bias, layer.rows, layer.columns))
        return x
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    tensors = [tensor for layer in layers for tensor in layer[:2]]
    y: Tensor = _Chain.apply(layers, flat, *tensors)  # type: ignore[no-untyped-call]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])
