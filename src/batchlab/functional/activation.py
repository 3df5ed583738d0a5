"""The activations that a normalization can apply in the same call."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "activate", "check_activation"]

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def check_activation(activation: str | None) -> None:
    """Raise ValueError unless `activation` is None or a name in `ACTIVATIONS`."""
    if activation is not None and activation not in ACTIVATIONS:
        allowed = ", ".join(repr(name) for name in (None, *ACTIVATIONS))
        raise ValueError(f"activation is {activation!r}; allowed are {allowed}. Apply any other one after the layer.")


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Apply the named activation (leaky ReLU with slope 0.01); None is the identity."""
    return x if activation is None else ACTIVATIONS[activation](x)
