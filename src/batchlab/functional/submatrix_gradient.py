"""The gradient of a submatrix: a tensor of the whole weight's shape that stores the kept block alone.

For an optimizer that changes kept rows and columns only, a dense gradient would cost more than all the rest: most of
it is zeros that are written, read and thrown away. This one says which entries took part, and is the same to everybody
else: any operation that it has no short form for sees the dense tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from batchlab import kernels, reference
from batchlab.functional.submatrix_gradient_view import read_only

__all__ = ["Block", "SubmatrixGradient", "scatter"]

aten = torch.ops.aten


class Block:
    """Values of kept rows x kept columns; None keeps all. A vector (a bias) has rows alone.

    The values may be given as two factors, scale · left^T right, of (samples, rows) and (samples, columns): much less
    to keep until the optimizer's step, which multiplies them piece by piece. Whoever asks for `values` gets them.

    Args:
        rows: kept rows, sorted, or None.
        columns: kept columns, sorted, or None.
        values: of the block; None where there are factors.
        factors: left, right and scale.
    """

    __slots__ = ("_values", "columns", "factors", "rows")

    def __init__(
        self,
        rows: Tensor | None,
        columns: Tensor | None,
        values: Tensor | None,
        factors: tuple[Tensor, Tensor, float] | None = None,
    ) -> None:
        self.rows, self.columns, self._values, self.factors = rows, columns, values, factors

    @property
    def values(self) -> Tensor:
        """The numbers, multiplied out now if they were not yet."""
        if self._values is None:
            if self.factors is None:
                raise ValueError("a block needs values or factors")
            left, right, scale = self.factors
            with torch.no_grad():  # the right factor is an activation, with a graph behind it
                self._values, self.factors = torch.mm(left.t(), right).mul_(scale), None
        return self._values

    @property
    def like(self) -> Tensor:
        """A tensor of the block's dtype and device."""
        return self.factors[0] if self.factors is not None else self.values

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        if self.factors is not None:
            return self.factors[0].shape[1], self.factors[1].shape[1]
        return tuple(self.values.shape)

    def with_values(self, values: Tensor) -> Block:
        """Other numbers at the same place."""
        return Block(self.rows, self.columns, values)

    def copy(self) -> Block:
        """The same numbers, in memory of their own as soon as they are changed."""
        if self.factors is not None:
            return Block(self.rows, self.columns, None, self.factors)
        return self.with_values(self.values.clone())

    def __deepcopy__(self, memo: Any) -> Block:
        return self.copy()  # a factor is inside of a graph, which torch does not copy


def scatter(block: Block, shape: torch.Size) -> Tensor:
    """The block among exact zeros, dense."""
    values = block.values
    if block.rows is None and block.columns is None:
        return values
    if values.ndim > 1 and kernels.submatrix.serves(values) and not (torch.is_grad_enabled() and values.requires_grad):
        return kernels.submatrix.scatter(values, block.rows, block.columns, shape)
    return reference.batchwise_dropout.scatter(values, block.rows, block.columns, shape)


def _dense(value: Any) -> Any:
    if isinstance(value, SubmatrixGradient):
        return value.to_dense()
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(item) for item in value)
    return value


def _written(value: Any) -> Any:
    """What an operation may write to in place of `value`."""
    if isinstance(value, SubmatrixGradient):
        return value.make_dense()
    if isinstance(value, (list, tuple)):
        return type(value)(_written(item) for item in value)
    return value


class SubmatrixGradient(torch.Tensor):
    """A gradient whose entries outside of some blocks of kept rows and columns are exactly zero.

    `batchlab.optim.SubmatrixSGD` asks for it: while such an optimizer holds a parameter, `parameter.grad` is one of
    these after a backward pass through a submatrix. Gradient clipping, `GradScaler`, accumulation over several
    batches and printing work on it; every other operation sees `to_dense()`.

    Attributes:
        blocks: the parts, whose sum is the gradient; accumulation adds one for each backward pass.

    >>> block = Block(torch.tensor([1]), torch.tensor([0, 2]), torch.ones(1, 2))
    >>> gradient = SubmatrixGradient(torch.Size([2, 3]), [block])
    >>> gradient.to_dense()
    tensor([[0., 0., 0.],
            [1., 0., 1.]])
    >>> gradient
    SubmatrixGradient(shape=(2, 3), kept=1 x 2)
    """

    blocks: list[Block]

    @staticmethod
    def __new__(
        cls,
        shape: torch.Size,
        blocks: list[Block],
        like: Tensor | None = None,
        strides: Sequence[int] | None = None,
    ) -> Self:
        """A gradient of `shape`, which keeps the list of blocks as it is given.

        Args:
            cls: the class.
            shape: of the whole.
            blocks: the parts.
            like: for dtype and device where there is no block.
            strides: of the parameter, if it is not contiguous: autograd copies what is laid out in another way.
        """
        values = blocks[0].like if blocks else like
        if values is None:
            raise ValueError("a SubmatrixGradient needs a block, or like= for its dtype and device")
        self = torch.Tensor._make_wrapper_subclass(cls, shape, strides, dtype=values.dtype, device=values.device)
        self.blocks = blocks
        return self

    def to_dense(self) -> Tensor:  # type: ignore[override]
        """The same numbers in an ordinary tensor."""
        if not self.blocks:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        total = scatter(self.blocks[0], self.shape)
        for block in self.blocks[1:]:
            total = total + scatter(block, self.shape)
        return total

    def make_dense(self) -> Tensor:
        """Store the dense tensor from now on, as if everything were kept; returns it."""
        if len(self.blocks) != 1 or self.blocks[0].rows is not None or self.blocks[0].columns is not None:
            self.blocks[:] = [Block(None, None, self.to_dense())]  # in place: `.data` and `.detach()` share the list
        return self.blocks[0].values

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as the dense tensor, which loads everywhere."""
        return self.to_dense().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kept = [" x ".join(map(str, block.shape)) for block in self.blocks]
        return f"SubmatrixGradient(shape={tuple(self.shape)}, kept={' + '.join(kept) or 'nothing'})"

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write to the entries, all of which take part from then on."""
        self.make_dense()[key] = _dense(value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Short forms for what happens to gradients in training; the dense tensor for everything else."""
        kwargs = kwargs or {}
        short = _SHORT_FORMS.get(func)
        if short is not None:
            result = short(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if func.is_view:  # of a tensor made for the occasion: reading is right, writing would be lost
            return read_only(func(*map(_dense, args), **{name: _dense(v) for name, v in kwargs.items()}))
        writes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
        given = [_written(v) if write else _dense(v) for v, write in zip(args, writes, strict=False)]
        named = {a.name: write for a, write in zip(func._schema.arguments, writes, strict=True)}
        options = {name: _written(v) if named[name] else _dense(v) for name, v in kwargs.items()}
        result = func(*given, **options)
        # An operation that writes returns what it wrote to: that is this gradient, not its inner tensor.
        for value, write, inner in zip(args, writes, given, strict=False):
            if write and result is inner:
                return value
        return result


def _like(gradient: SubmatrixGradient, blocks: list[Block]) -> SubmatrixGradient:
    return SubmatrixGradient(gradient.shape, blocks, gradient, gradient.stride())


def _alias(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    if not torch.is_grad_enabled():
        # Autograd detaches every gradient that it keeps. An alias shares the blocks anyway; making one costs more than
        # a small layer's arithmetic.
        return args[0]
    return _like(args[0], args[0].blocks)


def _clone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    return _like(args[0], [block.copy() for block in args[0].blocks])


def _new_empty(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    # With `_copy_` it is how autograd copies a gradient that somebody else holds too, a hook perhaps.
    gradient, sizes, strides = args
    if torch.Size(sizes) != gradient.shape or kwargs.get("dtype", gradient.dtype) != gradient.dtype:
        return NotImplemented
    return SubmatrixGradient(gradient.shape, [], gradient, strides)


def _copy_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    if not _both(args[:2], {}) or args[0].shape != args[1].shape:
        return NotImplemented
    args[0].blocks[:] = [block.copy() for block in args[1].blocks]
    return args[0]


def _both(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    pair = len(args) == 2 and all(isinstance(a, SubmatrixGradient) for a in args)
    return pair and kwargs.get("alpha", 1) == 1 and args[0].dtype == args[1].dtype


def _add(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    if not _both(args, kwargs):
        return NotImplemented
    return _like(args[0], [block.copy() for gradient in args for block in gradient.blocks])


def _add_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    if not _both(args, kwargs):
        return NotImplemented
    args[0].blocks.extend([block.copy() for block in args[1].blocks])
    return args[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (
        isinstance(value, Tensor) and not isinstance(value, SubmatrixGradient) and value.ndim == 0
    )


def _scale(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or not isinstance(args[0], SubmatrixGradient) or not _is_number(args[1]):
        return NotImplemented
    blocks = [block.with_values(func(block.values, args[1])) for block in args[0].blocks]
    return _like(args[0], blocks)


def _scale_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or not isinstance(args[0], SubmatrixGradient) or not _is_number(args[1]):
        return NotImplemented
    for block in args[0].blocks:
        func(block.values, args[1])
    return args[0]


def _zero_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    args[0].blocks.clear()
    return args[0]


def _norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A sum over two batches' blocks overlaps; and only for positive orders do zeros not count.
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    if len(args) > 2 or set(kwargs) - {"ord"} or order <= 0 or len(args[0].blocks) != 1 or not args[0].numel():
        return NotImplemented
    values = args[0].blocks[0].values
    return func(values, order) if values.numel() else values.new_zeros(())


def _add_up(gradient: SubmatrixGradient) -> None:
    """Where several blocks have an entry, let the first one have the sum, and the others zero."""
    if len(gradient.blocks) < 2:
        return
    total, taken = gradient.to_dense(), torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    for index, block in enumerate(gradient.blocks):
        here = scatter(block.with_values(torch.ones_like(block.values)), gradient.shape)
        values = total.where((here > 0) & (taken == 0), 0)
        for dimension, kept in enumerate((block.rows, block.columns)):
            values = values if kept is None else values.index_select(dimension, kept)
        gradient.blocks[index] = block.with_values(values.contiguous())
        taken = taken + here


def _clamp_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Zeros stay zero within limits of both signs.
    low, high = ({"min": None, "max": None} | dict(zip(("min", "max"), args[1:], strict=False)) | kwargs).values()
    if (low is not None and low > 0) or (high is not None and high < 0):
        return NotImplemented
    _add_up(args[0])
    for block in args[0].blocks:
        func(block.values, low, high)
    return args[0]


def _each_clamp(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    limits = {"max": args[1]} if func is aten._foreach_clamp_max_.Scalar else {"min": args[1]}
    for gradient in args[0]:
        gradient.clamp_(**limits)


def _stored(gradients: Any) -> list[Any]:
    found = []
    for gradient in gradients:
        if isinstance(gradient, SubmatrixGradient):
            found += [block.values for block in gradient.blocks]
        else:
            found.append(gradient)
    return found


def _each_stored(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In-place operations on lists that leave zeros at zero: on what is stored."""
    if isinstance(args[1], (list, tuple)):
        return NotImplemented
    stored = _stored(args[0])
    if stored:  # after zero_grad(set_to_none=False) there may be nothing
        func(stored, *args[1:], **kwargs)
    return None


def _each_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    if len(args) > 2 or set(kwargs) - {"ord"}:
        return NotImplemented
    return [torch.linalg.vector_norm(gradient, order) for gradient in args[0]]


_SHORT_FORMS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten.copy_.default: _copy_,
    aten.new_empty_strided.default: _new_empty,
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add_,
    aten.mul.Tensor: _scale,
    aten.div.Tensor: _scale,
    aten.mul_.Tensor: _scale_,
    aten.div_.Tensor: _scale_,
    aten.zero_.default: _zero_,
    aten.clamp_.default: _clamp_,
    aten.linalg_vector_norm.default: _norm,
    aten._foreach_norm.Scalar: _each_norm,
    aten._foreach_clamp_max_.Scalar: _each_clamp,
    aten._foreach_clamp_min_.Scalar: _each_clamp,
    aten._foreach_mul_.Scalar: _each_stored,
    aten._foreach_mul_.Tensor: _each_stored,
    aten._foreach_div_.Scalar: _each_stored,
    aten._foreach_div_.Tensor: _each_stored,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _each_stored,
}
