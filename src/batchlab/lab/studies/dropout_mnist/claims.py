"""What the study dropout-mnist claims, as numbers."""

from __future__ import annotations

from batchlab.lab.claims import Claim
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_mnist.summary import Summary

__all__ = ["claims"]


def claims(finished: Finished, summary: Summary) -> list[Claim]:  # noqa: ARG001
    """Differences of the arms' test errors, and how many times batchwise dropout is faster."""
    errors = [
        Claim(f"test error, {pair}, points", value, 0.0, percent=True) for pair, value in summary.differences.items()
    ]
    return errors + [Claim(f"seconds of {name} over batchwise", value) for name, value in summary.speedup.items()]
