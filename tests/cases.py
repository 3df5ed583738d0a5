"""One table of awkward inputs: every batch-norm path has to pass on every line of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """An input with what normalizes it.

    `make` returns a float64 input; tests round it to the dtype under test first, so that all see the same numbers.
    """

    name: str
    make: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    affine: str = "random"  # "random" (negative and zero weights among them) or "none"
    eps: float = 1e-5

    def input(self) -> Tensor:
        torch.manual_seed(len(self.name))
        return self.make().to(self.dtype).contiguous(memory_format=self.memory_format)

    def affine_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        if self.affine == "none":
            return None, None
        features = self.make().shape[1]
        generator = torch.Generator().manual_seed(features)
        weight = torch.randn(features, generator=generator) * 2
        weight[0] = 0
        bias = torch.randn(features, generator=generator)
        return weight, bias


def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Callable[[], Tensor]:
    def make() -> Tensor:
        offsets = 1 + torch.arange(shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2)) / shape[1]
        return torch.randn(shape, dtype=torch.float64) * std + mean * offsets

    return make


def outlier_first(*shape: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        x = torch.randn(shape, dtype=torch.float64)
        x[0, :] *= 1e4
        return x

    return make


def constant(*shape: int, value: float) -> Callable[[], Tensor]:
    return lambda: torch.full(shape, value, dtype=torch.float64)


def skewed(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64).mul(2).exp()


LAST2D, LAST3D = torch.channels_last, torch.channels_last_3d

CASES = [
    Case("2d", normal(60, 100)),
    Case("2d-no-affine", normal(60, 100), affine="none"),
    Case("2d-two-samples", normal(2, 3)),
    Case("2d-odd", normal(7, 13)),
    Case("2d-many-samples", normal(5000, 3)),
    Case("3d", normal(5, 3, 17)),
    Case("3d-batch-of-one", normal(1, 4, 9)),
    Case("4d", normal(4, 8, 6, 5)),
    Case("4d-batch-of-one", normal(1, 3, 2, 2)),
    Case("4d-one-pixel", normal(6, 5, 1, 1)),
    Case("4d-one-channel", normal(4, 1, 5, 5)),
    Case("4d-channels-last", normal(4, 8, 6, 5), memory_format=LAST2D),
    Case("4d-large-channels-last", normal(16, 12, 28, 28), memory_format=LAST2D),
    Case("5d", normal(2, 3, 4, 5, 3)),
    Case("5d-channels-last", normal(2, 3, 4, 5, 3), memory_format=LAST3D),
    Case("mean-1e3-2d", normal(60, 10, mean=1e3)),
    Case("mean-1e3-3d", normal(9, 4, 20, mean=1e3)),
    Case("mean-1e3-4d", normal(8, 6, 9, 9, mean=1e3)),
    Case("mean-1e3-channels-last", normal(8, 6, 9, 9, mean=1e3), memory_format=LAST2D),
    Case("mean-minus-1e5-2d", normal(60, 10, mean=-1e5)),
    Case("mean-1e5-channels-last", normal(8, 6, 9, 9, mean=1e5), memory_format=LAST2D),
    Case("tiny-variance", normal(60, 10, mean=1.0, std=1e-4)),
    Case("tiny-everything", normal(60, 10, std=1e-6)),
    Case("large-everything", normal(60, 10, mean=1e6, std=1e6)),
    Case("huge-scale", normal(30, 4, std=1e15)),
    Case("constant-channel", constant(20, 3, value=3.7)),
    Case("constant-large", constant(8, 4, 5, 5, value=1.2e8)),
    Case("outlier-first", outlier_first(200, 5)),
    Case("outlier-first-4d", outlier_first(20, 3, 6, 6), memory_format=LAST2D),
    Case("skewed", skewed(300, 6)),
    Case("large-eps", normal(20, 5), eps=1.0),
    Case("small-eps", normal(20, 5), eps=1e-12),
    Case("float64", normal(30, 7, mean=1e3), dtype=torch.float64),
    Case("bfloat16", normal(40, 6, mean=5.0), dtype=torch.bfloat16),
    Case("float16", normal(8, 4, 6, 6, mean=5.0), dtype=torch.float16),
    Case("bfloat16-channels-last", normal(8, 4, 6, 6), dtype=torch.bfloat16, memory_format=LAST2D),
]

CASE_IDS = [case.name for case in CASES]
