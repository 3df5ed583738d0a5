"""Shapes, dtypes and strides of what batch norm's compiled operations return, for compilers: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["describe_results"]


def _of_channels(x: Tensor, *rows: int) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((*rows, x.shape[1]), dtype=dtype)


def _alike(x: Tensor) -> Tensor:
    # Not `empty_like`, which gives dimensions of size 1 strides of its own choice.
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _normalized(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _alike(x), _of_channels(x, 3)


def _moments(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float64)


def _gradient_sums(_gradient: Tensor, x: Tensor, *_: object) -> Tensor:
    return _moments(x)


def _gradients(_gradient: Tensor, x: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    activation, residual_needed = others[7:9]  # a mask may follow
    own = residual_needed and activation != 0
    of_residual = _alike(x) if own else _of_channels(x).new_empty(0)
    return _alike(x), of_residual, _of_channels(x), _of_channels(x)


def _like_the_input(_mask: Tensor, x: Tensor) -> Tensor:
    return _alike(x)


def describe_results() -> None:
    """Register these with the operations, which have to be loaded."""
    fakes: dict[str, Callable[..., object]] = {
        "forward_": _normalized,
        "evaluate": _normalized,
        "moments": _moments,
        "gradient_sums": _gradient_sums,
        "backward": _gradients,
        "unpack_relu_mask": _like_the_input,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"batchlab_batch_norm::{name}", fake)
