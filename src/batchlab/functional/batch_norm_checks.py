"""What batch normalization refuses: shapes and dtypes that do not fit, a mask without meaning, a batch of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchlab.functional.batch_norm_training import samples_per_channel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["check_input", "check_mask", "check_residual", "check_running", "check_sample_count"]


def _shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def check_input(x: Tensor, channel_tensors: dict[str, Tensor | None]) -> None:
    """Raise unless `x` is floating-point (N, C, ...) and what is given per channel has C entries."""
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {_shape(x)}; batch normalization needs (N, C, ...), with channels in dimension 1"
        )
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; batch normalization needs a real floating-point input: call x.float() first")
    channels = x.shape[1]
    for name, value in channel_tensors.items():
        if value is not None and (value.ndim != 1 or value.shape[0] != channels):
            raise ValueError(
                f"{name} has shape {_shape(value)}, but x of shape {_shape(x)} has {channels} channels in dimension 1"
            )


def check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask as bool, expanded to (N, 1, ...); raise if it does not fit."""
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask is {mask.dtype}; it must be bool, True where an entry is valid: use mask != 0")
    target = (x.shape[0], 1, *x.shape[2:])
    try:
        return mask.to(torch.bool).expand(target)
    except RuntimeError:
        hint = " (mask.unsqueeze(1) adds the channel dimension)" if mask.ndim == x.ndim - 1 else ""
        raise ValueError(
            f"mask has shape {_shape(mask)}; for x of shape {_shape(x)} it must broadcast to {target}{hint}"
        ) from None


def check_residual(residual: Tensor, x: Tensor) -> None:
    """Raise ValueError unless the residual has the input's shape."""
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {_shape(residual)}, x has {_shape(x)}; they must be the same")


def check_running(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Raise ValueError if one running statistic is given without the other."""
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing} is None and the other is not: give both running statistics or neither")


def check_sample_count(x: Tensor, mask: Tensor | None, process_group: ProcessGroup | None) -> None:
    """Raise ValueError if the batch has a single value per channel."""
    # A count that depends on a mask or on other ranks is known on the device only; there, a single sample gives zeros.
    if mask is None and process_group is None and samples_per_channel(x) == 1:
        raise ValueError(
            f"x of shape {_shape(x)} has one value per channel, and batch statistics need at least two. Use larger "
            "batches (DataLoader(drop_last=True) drops a last odd one), or running statistics: training=False in the "
            "function, .eval() or statistics='running' on the layer."
        )
