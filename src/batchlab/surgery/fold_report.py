"""What `fold` did, what it refused, and why."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

__all__ = ["FoldEntry", "FoldReport", "FoldResult"]


class FoldEntry(NamedTuple):
    """What happened to one batch normalization.

    Attributes:
        norm: its name in the model.
        layer: the layer it became part of, or None.
        action: "folded" or "refused".
        where: "into the layer before", "into the layer after", or None.
        reason: why it was refused, or None.
    """

    norm: str
    layer: str | None
    action: str
    where: str | None
    reason: str | None


class FoldReport(NamedTuple):
    """One entry per batch normalization, and how closely the folded model agrees with the original.

    Attributes:
        entries: in the order of `model.named_modules()`.
        max_difference: largest absolute difference of the two models' outputs on the example; where there are several
            outputs, in the one that uses most of its tolerance.
        tolerance: what it was allowed to be.

    >>> print(FoldReport((FoldEntry("1", "0", "folded", "into the layer before", None),), 1e-7, 1e-4))
    batch normalization  action  layer  where                  reason
    1                    folded  0      into the layer before  -
    1 folded, 0 refused; outputs differ by at most 1e-07 (allowed: 0.0001)
    """

    entries: tuple[FoldEntry, ...]
    max_difference: float
    tolerance: float

    @property
    def folded(self) -> tuple[FoldEntry, ...]:
        """The entries that were folded."""
        return tuple(entry for entry in self.entries if entry.action == "folded")

    @property
    def refused(self) -> tuple[FoldEntry, ...]:
        """The entries that were refused."""
        return tuple(entry for entry in self.entries if entry.action == "refused")

    def __str__(self) -> str:
        """A table with one line per batch normalization, and the verification."""
        if not self.entries:
            return "no batch normalization in the model"
        rows = [("batch normalization", "action", "layer", "where", "reason")]
        rows += [
            (e.norm or "(the model)", e.action, e.layer or "-", e.where or "-", e.reason or "-") for e in self.entries
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        counts = f"{len(self.folded)} folded, {len(self.refused)} refused"
        agree = f"outputs differ by at most {self.max_difference:.3g} (allowed: {self.tolerance:.3g})"
        return "\n".join([*lines, f"{counts}; {agree}"])


class FoldResult(NamedTuple):
    """The folded copy and the report about it."""

    model: nn.Module
    report: FoldReport
