"""What the study whitening claims, as numbers."""

from __future__ import annotations

from batchlab.lab.claims import Claim
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.whitening.settings import ARMS
from batchlab.lab.studies.whitening.summary import Summary

__all__ = ["claims"]


def claims(finished: Finished, summary: Summary) -> list[Claim]:  # noqa: ARG001
    """Steps and end of each arm against batch norm and against none."""
    others = [name for name in ARMS if name != "batch_norm"]
    steps = [
        Claim(f"{ARMS[name]}: batch norm's steps over its own", summary.than_batch_norm.get(name)) for name in others
    ]
    ends = [
        Claim(f"{ARMS[name]}: accuracy at the end less that of none, points", result.gain, 0.0, percent=True)
        for name, result in summary.results.items()
        if result.gain is not None
    ]
    return steps + ends
