"""What `initialize` did to each layer with weights, and what it took into account."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

__all__ = ["InitializationEntry", "InitializationReport", "InitializationResult"]


class InitializationEntry(NamedTuple):
    """What happened to one layer.

    Attributes:
        layer: its name in the model.
        action: "initialized" or "left".
        slope: of the rectifier that was counted; None where the layer was left.
        keep: of the dropouts in front.
        terms: products in each sum, the paper's n.
        std: of the new weights.
        reason: where slope and keep come from, or why the layer was left.
    """

    layer: str
    action: str
    slope: float | None
    keep: float | None
    terms: float | None
    std: float | None
    reason: str


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


class InitializationReport(NamedTuple):
    """One entry per layer with weights, in the order of `model.named_modules()`.

    >>> print(InitializationReport((InitializationEntry("0", "initialized", 0.0, 0.5, 100.0, 0.1, "behind ReLU '1'"),)))
    layer  action       slope  keep  terms  std  reason
    0      initialized  0      0.5   100    0.1  behind ReLU '1'
    1 initialized, 0 left
    """

    entries: tuple[InitializationEntry, ...]

    @property
    def initialized(self) -> tuple[InitializationEntry, ...]:
        """The entries that were initialized."""
        return tuple(entry for entry in self.entries if entry.action == "initialized")

    @property
    def left(self) -> tuple[InitializationEntry, ...]:
        """The entries that were left as they were."""
        return tuple(entry for entry in self.entries if entry.action == "left")

    def __str__(self) -> str:
        """A table with one line per layer."""
        rows = [("layer", "action", "slope", "keep", "terms", "std", "reason")]
        for e in self.entries:
            numbers = [_number(value) for value in (e.slope, e.keep, e.terms, e.std)]
            rows.append((e.layer or "(the model)", e.action, numbers[0], numbers[1], numbers[2], numbers[3], e.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self.initialized)} initialized, {len(self.left)} left"])


class InitializationResult(NamedTuple):
    """The model, which is the one that was given, and the report about it."""

    model: nn.Module
    report: InitializationReport
