"""Which features a batch keeps: one pattern for all of its samples, drawn on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchlab import kernels

__all__ = ["check_rate", "draw", "draw_count", "draw_counts", "draw_pattern", "inverted_scale", "kept_count"]


def check_rate(p: float) -> None:
    """Raise unless p is a probability."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"p is {p!r}; it is the share of features to drop, from 0 to 1")


def kept_count(num_features: int, p: float) -> int:
    """How many features an exact pattern keeps: n(1 - p), rounded to the nearest (ties to even).

    >>> kept_count(800, 0.5), kept_count(784, 0.2), kept_count(3, 0.9)
    (400, 627, 0)
    """
    return round(num_features * (1 - p))


def inverted_scale(num_features: int, kept: int, p: float, exact: bool) -> float:
    """What kept features are multiplied by in training, so that evaluation needs no scaling; 1 where none is kept."""
    if exact:
        return num_features / kept if kept else 1.0
    return 1 / (1 - p) if p < 1 else 1.0


@torch.library.custom_op("batchlab::draw_pattern", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_exact_op(num_features: int, count: int) -> Tensor:
    """Torch's default generator inside a compiled graph, where a call of randperm would take the compiler's own."""
    return _draw_exact(num_features, count, None)


@_draw_exact_op.register_fake
def _(num_features: int, count: int) -> Tensor:  # noqa: ARG001
    return torch.empty(count, dtype=torch.int64, device="cpu")


@torch.library.custom_op("batchlab::draw_bernoulli", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_bernoulli_op(num_features: int, p: float) -> Tensor:
    """Whether each feature is kept: how many are kept no compiler can know, so it breaks the graph behind this."""
    return torch.rand(num_features) >= p


@_draw_bernoulli_op.register_fake
def _(num_features: int, p: float) -> Tensor:  # noqa: ARG001
    return torch.empty(num_features, dtype=torch.bool, device="cpu")


def _draw_exact(num_features: int, count: int, generator: torch.Generator | None) -> Tensor:
    order = torch.randperm(num_features, generator=generator)
    if torch.compiler.is_compiling():
        return order[:count].sort().values
    if kernels.submatrix.available():
        return kernels.submatrix.sorted_first(order, count)
    chosen = torch.zeros(num_features, dtype=torch.bool).index_fill_(0, order[:count], True)
    return chosen.nonzero().view(-1)  # sorted, and cheaper than a sort


def draw_pattern(
    num_features: int, p: float, *, exact: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the features that one batch keeps.

    exact:      a uniformly random subset of round(n(1 - p)) of the n features
    otherwise:  each feature is kept with probability 1 - p, independently (Bernoulli)

    The pattern is drawn on the CPU, from `generator` or torch's default one, so a seed gives the same patterns on any
    device, in compiled code, and when a checkpoint computes again.

    Shapes:
        result: (kept,) int64 on the CPU, sorted.

    Args:
        num_features: n.
        p: share to drop.
        exact: a fixed number, or each for itself.
        generator: a CPU generator; None: torch's default.

    Raises:
        ValueError: p is no probability, `num_features` is negative, or the generator is not on the CPU.

    Source: Graham, Reizenstein & Robinson 2015, section 2 ("batchwise", and "batchwise with a fixed amount").

    >>> draw_pattern(6, 0.5, generator=torch.Generator().manual_seed(0))
    tensor([2, 3, 5])
    """
    check_rate(p)
    if num_features < 0:
        raise ValueError(f"num_features is {num_features}; it must be 0 or more")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"the generator is on {generator.device}; patterns are drawn on the CPU: torch.Generator()")
    return draw(num_features, p, exact, generator)


def draw(num_features: int, p: float, exact: bool, generator: torch.Generator | None) -> Tensor:
    """`draw_pattern` without its checks."""
    if exact:
        return draw_count(num_features, kept_count(num_features, p), generator)
    if generator is None and torch.compiler.is_compiling():
        chosen: Tensor = _draw_bernoulli_op(num_features, p)
    else:
        chosen = torch.rand(num_features, generator=generator) >= p
    return chosen.nonzero().view(-1)


def draw_count(num_features: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw `count` of the features, each subset with the same probability; sorted int64 on the CPU."""
    if generator is None and torch.compiler.is_compiling():
        kept: Tensor = _draw_exact_op(num_features, count)
        return kept
    return _draw_exact(num_features, count, generator)


def draw_counts(sizes: Sequence[int], counts: Sequence[int]) -> list[Tensor]:
    """`draw_count` for each of several dropouts, from torch's default generator: the same patterns, at less cost."""
    if kernels.submatrix.available() and not torch.compiler.is_compiling():
        return kernels.submatrix.draw(sizes, counts)
    return [draw_count(size, count, None) for size, count in zip(sizes, counts, strict=True)]
