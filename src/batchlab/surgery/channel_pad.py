"""Padding with a value per channel: what a zero-padded convolution needs when it takes in the normalization before it.

In conv(pad₀(s·x + t)) the border is 0 after the normalization, that is -t/s before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ChannelPad"]


class ChannelPad(nn.Module):
    """Pad the last dimensions with a constant of its own for each channel.

    y[:, c] = x[:, c] inside, value[c] on the border

    Shapes:
        input: (N, C, ...) with as many further dimensions as `padding` has pairs; output: the same, padded.

    Args:
        padding: one (before, after) pair per dimension, the last dimension first, as in `torch.nn.functional.pad`.
        value: (C,), a buffer.

    Raises:
        ValueError: an odd or negative padding, a value that is not (C,), or an input of another shape.

    >>> import torch
    >>> ChannelPad([1, 0], torch.tensor([7.0, 8.0]))(torch.zeros(1, 2, 2)).tolist()
    [[[7.0, 0.0, 0.0], [8.0, 0.0, 0.0]]]
    """

    value: Tensor

    def __init__(self, padding: Sequence[int], value: Tensor) -> None:
        super().__init__()
        if len(padding) % 2 or min(padding, default=-1) < 0:
            raise ValueError(f"padding is {list(padding)}; give one (before, after) pair of sizes >= 0 per dimension")
        if value.ndim != 1:
            raise ValueError(f"value has shape {tuple(value.shape)}; it must be (C,), one number per channel")
        self.padding = tuple(padding)
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, padded."""
        spatial = len(self.padding) // 2
        if x.ndim != spatial + 2 or x.shape[1] != self.value.shape[0]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; padding {list(self.padding)} with {self.value.shape[0]} values needs "
                f"(N, {self.value.shape[0]}{', size' * spatial})"
            )
        pairs = list(zip(self.padding[::2], self.padding[1::2], strict=True))[::-1]
        sizes = [before + size + after for size, (before, after) in zip(x.shape[2:], pairs, strict=True)]
        border = self.value.to(x.dtype).view(1, -1, *[1] * spatial)
        padded = border.expand(x.shape[0], -1, *sizes).clone(memory_format=torch.contiguous_format)
        inside = [slice(before, before + size) for size, (before, _) in zip(x.shape[2:], pairs, strict=True)]
        padded[(slice(None), slice(None), *inside)] = x
        return padded

    def extra_repr(self) -> str:
        """The sizes and the number of channels."""
        return f"{list(self.padding)}, channels={self.value.shape[0]}"
