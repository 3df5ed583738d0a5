"""What the records of the study dropout-patterns say, as numbers: everything that its report and README quote."""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.lab.comparison import Estimate, estimate, final_error, paired_difference
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_patterns.settings import DropoutPatternsSettings
from batchlab.lab.studies.search import Scores

__all__ = ["Summary", "summarize"]


@dataclass(frozen=True)
class Summary:
    """All numbers of the study.

    Args:
        chosen: each arm's best rate.
        scores: of the search.
        errors: arm -> test error at the end.
        more_than_exact: arm -> paired difference of its test error to that of a new exact pattern each batch.
        enough: the smallest number of patterns from which on no arm differs clearly from that; None: none is enough.
    """

    chosen: dict[str, float]
    scores: Scores
    errors: dict[str, Estimate]
    more_than_exact: dict[str, Estimate]
    enough: int | None


def summarize(finished: Finished) -> Summary:
    """Compute the summary of a finished study from its records."""
    settings: DropoutPatternsSettings = finished.settings
    errors = {name: [final_error(record) for record in finished.runs(name)] for name in finished.chosen}
    more = {name: paired_difference(errors["exact"], values) for name, values in errors.items() if name != "exact"}
    enough = None
    for number in sorted(settings.patterns, reverse=True):
        gap = more[f"patterns{number}"]
        if gap.low > 0 or gap.high < 0:  # one seed has no interval, and is clear of nothing
            break
        enough = number
    return Summary(
        finished.chosen, finished.scores, {name: estimate(values) for name, values in errors.items()}, more, enough
    )
