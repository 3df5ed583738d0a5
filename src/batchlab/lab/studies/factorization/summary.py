"""What the records of the study factorization say, as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from batchlab.lab.comparison import Estimate, StepsToTarget, paired_ratio, paired_share
from batchlab.lab.studies.arm_results import ArmResult, arm_results
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.factorization.settings import (
    ARMS,
    BASELINE,
    REFERENCE,
    FactorizationSettings,
    full_name,
)
from batchlab.lab.studies.search import Scores

__all__ = ["StartSummary", "Summary", "at_target", "compare", "summarize"]


@dataclass(frozen=True)
class StartSummary:
    """The arms from one start.

    Args:
        results: each arm against the plain network.
        target: the hardest accuracy that every run of the plain network and of batch norm reached; None: there is none.
        gain: steps of the plain network divided by batch norm's, to that target, paired by seed; None: no target.
        shares: arm -> log(plain steps / its steps) divided by log(plain steps / batch norm's steps), as a ratio of
            means over seeds; only arms of which every run got there, and empty if batch norm has no clear gain.
        than_reference: arm -> batch norm's steps divided by its own; only arms of which every run got there.
    """

    results: dict[str, ArmResult]
    target: float | None
    gain: Estimate | None
    shares: dict[str, Estimate]
    than_reference: dict[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """All numbers of the study.

    Args:
        chosen: best rate of each arm and start.
        scores: of the search.
        starts: start -> what its arms did.
    """

    chosen: dict[str, float]
    scores: Scores
    starts: dict[str, StartSummary]


def at_target(result: ArmResult, target: float) -> StepsToTarget:
    """How an arm reached one of the targets."""
    return next(row for row in result.steps if row.target == target)


def compare(results: dict[str, ArmResult]) -> StartSummary:
    """Choose the target, and take each arm's share of batch norm's gain."""
    rows = results[REFERENCE].steps
    target = max((row.target or 0.0 for row in rows if None not in (*row.baseline, *row.other)), default=None)
    if target is None:
        return StartSummary(results, None, None, {}, {})
    steps = {
        name: [max(n, 1) for n in at_target(result, target).other if n is not None] for name, result in results.items()
    }
    there = {name: own for name, own in steps.items() if len(own) == len(steps[BASELINE])}

    def logs(arm: str) -> list[float]:
        return [math.log(plain / own) for plain, own in zip(there[BASELINE], there[arm], strict=True)]

    shares = {name: paired_share(logs(name), logs(REFERENCE)) for name in there if name not in (BASELINE, REFERENCE)}
    return StartSummary(
        results,
        target,
        paired_ratio(there[BASELINE], there[REFERENCE]),
        {name: share for name, share in shares.items() if share is not None},
        {name: paired_ratio(there[REFERENCE], own) for name, own in there.items() if name != REFERENCE},
    )


def summarize(finished: Finished) -> Summary:
    """Compute the summary of a finished study from its records."""
    settings: FactorizationSettings = finished.settings
    starts = {}
    for start in settings.starts:
        chosen = {full_name(name, start): finished.chosen[full_name(name, start)] for name in ARMS}
        found = arm_results(replace(finished, chosen=chosen), full_name(BASELINE, start), settings.targets)
        starts[start] = compare({name: found[full_name(name, start)] for name in ARMS})
    return Summary(finished.chosen, finished.scores, starts)
