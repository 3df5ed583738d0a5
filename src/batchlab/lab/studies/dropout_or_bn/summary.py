"""What the records of the study dropout-or-bn say, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.lab.comparison import Estimate, estimate, final_error
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.search import Scores

__all__ = ["Summary", "summarize"]


@dataclass(frozen=True)
class Summary:
    """All numbers of the study.

    Args:
        chosen: each arm's best rate.
        scores: of the search.
        errors: test error of each arm.
    """

    chosen: dict[str, float]
    scores: Scores
    errors: dict[str, Estimate]


def summarize(finished: Finished) -> Summary:
    """Compute the summary of a finished study from its records."""
    errors = {name: estimate([final_error(record) for record in finished.runs(name)]) for name in finished.chosen}
    return Summary(finished.chosen, finished.scores, errors)
