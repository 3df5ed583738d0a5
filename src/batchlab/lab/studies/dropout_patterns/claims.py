"""What the study dropout-patterns claims, as numbers."""

from __future__ import annotations

from batchlab.lab.claims import Claim
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_patterns.summary import Summary

__all__ = ["claims"]


def claims(finished: Finished, summary: Summary) -> list[Claim]:  # noqa: ARG001
    """Each arm's test error against that of a new exact pattern each batch."""
    return [
        Claim(f"{name}: test error less that of a new exact pattern each batch, points", value, 0.0, percent=True)
        for name, value in summary.more_than_exact.items()
    ]
