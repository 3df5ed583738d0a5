"""Views of a gradient that stores the kept block alone: they can be read, and to write into one is an error."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

__all__ = ["SubmatrixGradientView", "read_only"]


class SubmatrixGradientView(torch.Tensor):
    """A view of the dense tensor of a `SubmatrixGradient`, which is made for the occasion and kept by nobody.

    Reading gives what the dense tensor gives.

    Raises:
        RuntimeError: an operation would write into it.
    """

    seen: Tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation on what is seen."""
        kwargs = kwargs or {}
        written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        targets = (given.get(argument.name) for argument in written)
        if any(isinstance(t, cls) for t in chain(*(t if isinstance(t, (list, tuple)) else [t] for t in targets))):
            raise RuntimeError(
                f"{func} writes into a view of a SubmatrixGradient, and would be lost. Write by an index "
                "(parameter.grad[:3] = 0), or make the gradient dense first: parameter.grad = parameter.grad.to_dense()"
            )
        result = func(*map(_seen, args), **{name: _seen(value) for name, value in kwargs.items()})
        return read_only(result) if func.is_view else result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.seen)


def _seen(value: Any) -> Any:
    if isinstance(value, SubmatrixGradientView):
        return value.seen
    return type(value)(map(_seen, value)) if isinstance(value, (list, tuple)) else value


def read_only(values: Any) -> Any:
    """The tensor, or each of a list of them, as a view that cannot be written to."""
    if isinstance(values, (list, tuple)):
        return type(values)(map(read_only, values))
    self: Any = torch.Tensor._make_wrapper_subclass(
        SubmatrixGradientView,
        values.shape,
        values.stride(),
        values.storage_offset(),
        dtype=values.dtype,
        device=values.device,
    )
    self.seen = values
    return self
