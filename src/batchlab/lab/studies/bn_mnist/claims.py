"""What the study bn-mnist claims, as numbers."""

from __future__ import annotations

from typing import Final

from batchlab.lab.claims import Claim
from batchlab.lab.studies.bn_mnist.summary import Summary

__all__ = ["claims"]

TITLES: Final = {
    "own": "each at its own best rate",
    "same": "both at the rate that is best without",
    "well_scaled": "from well-scaled first weights",
}


def claims(summary: Summary) -> list[Claim]:
    """Steps to the hardest accuracy that every run reached, and the accuracy at the end, with against without."""
    found = []
    for name, comparison in summary.comparisons.items():
        ratio = None if comparison.headline is None else comparison.headline.ratio
        found.append(Claim(f"{TITLES[name]}: steps without batch norm over steps with", ratio))
        found.append(
            Claim(f"{TITLES[name]}: accuracy more with batch norm, points", comparison.gain, 0.0, percent=True)
        )
    return found
