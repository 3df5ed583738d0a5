"""What the study factorization claims, as numbers."""

from __future__ import annotations

from batchlab.lab.claims import Claim
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.factorization.settings import BASELINE, LABELS, REFERENCE, STARTS
from batchlab.lab.studies.factorization.summary import Summary

__all__ = ["claims"]


def claims(finished: Finished, summary: Summary) -> list[Claim]:  # noqa: ARG001
    """Batch norm's gain from each start, the share of it that each arm keeps, and each arm against batch norm."""
    found = []
    for start, of in summary.starts.items():
        where = f"from {STARTS[start]}"
        found.append(Claim(f"batch norm {where}: steps of the plain network over its own", of.gain))
        for name, label in LABELS.items():
            if name not in (BASELINE, REFERENCE):
                share = of.shares.get(name)
                found.append(Claim(f"{label} {where}: share of batch norm's gain, against none of it", share, 0.0))
                found.append(Claim(f"{label} {where}: batch norm's steps over its own", of.than_reference.get(name)))
    return found
