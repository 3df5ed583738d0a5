"""What the study learning-rates claims, as numbers."""

from __future__ import annotations

import math

from batchlab.lab.claims import Claim
from batchlab.lab.comparison import Estimate
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.learning_rates.settings import ACTIVATIONS, BASELINE, arm, label
from batchlab.lab.studies.learning_rates.summary import Summary, Times

__all__ = ["claims"]


def _bounds(found: Times | None, seeds: int) -> Estimate | None:
    """A factor with the bounds that seeds and grid allow: no interval of Student's, but read the same way."""
    if found is None:
        return None
    if seeds == 1:
        return Estimate(found.factor, math.nan, math.nan, 1)
    return Estimate(found.factor, found.low, math.inf if found.high is None else found.high, seeds)


def claims(finished: Finished, summary: Summary) -> list[Claim]:
    """Each arm's largest rate against that without a mechanism; batch norm at the rate that is best without."""
    seeds = finished.settings.search_seeds
    found = []
    for activation, condition in summary.conditions.items():
        kind = ACTIVATIONS[activation][0]
        first, batch_norm = arm(activation, BASELINE), arm(activation, "batch_norm")
        found += [
            Claim(
                f"{label(name)}, {kind}: its largest rate over that without a mechanism",
                _bounds(condition.largest.get(name), seeds),
            )
            for name in condition.limits
            if name != first
        ]
        found.append(
            Claim(
                f"batch norm, {kind}: accuracy more at the rate that is best without, points",
                condition.at_baseline[batch_norm],
                0.0,
                percent=True,
            )
        )
    return found
