"""What the tests of batch norm's compiled kernel go through: activations and dtypes, and how exact each has to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "DTYPES", "FLOOR"]

ACTIVATIONS: Final[dict[str | None, Callable[[Tensor], Tensor]]] = {
    None: lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
"""Name, in the order of the kernel's numbers, -> torch's own function."""

FLOOR: Final = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""What rounding alone may change numbers near 1 by: a few units in the last place."""

DTYPES: Final = list(FLOOR)
