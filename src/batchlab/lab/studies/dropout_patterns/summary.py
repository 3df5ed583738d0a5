"""What the records of the study dropout-patterns say, as numbers: everything that its report and README quote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batchlab.lab.comparison import Estimate, estimate, final_score, paired_difference
from batchlab.lab.records import RunRecord
from batchlab.lab.studies.dropout_patterns.settings import DropoutPatternsSettings, arms
from batchlab.lab.studies.search import Scores, run_name

__all__ = ["LAST", "Summary", "arm_records", "summarize", "to_json"]

LAST = 0.1
"""A run's test error is the mean over the evaluations in this last share of its steps: a single one is noisy."""


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


def arm_records(
    settings: DropoutPatternsSettings, records: Mapping[str, RunRecord], chosen: Mapping[str, float], arm: str
) -> list[RunRecord]:
    """The final runs of an arm, by seed."""
    return [records[run_name("final", arm, chosen[arm], seed)] for seed in range(settings.seeds)]


def _final_error(record: RunRecord) -> float:
    return 0.9 if record.diverged else 1 - final_score(record, LAST)


def summarize(
    settings: DropoutPatternsSettings,
    records: Mapping[str, RunRecord],
    chosen: dict[str, float],
    scores: Scores,
) -> Summary:
    """Compute the summary of a finished study from its records."""
    errors = {
        name: [_final_error(record) for record in arm_records(settings, records, chosen, name)]
        for name in arms(settings)
    }
    more = {name: paired_difference(errors["exact"], values) for name, values in errors.items() if name != "exact"}
    enough = None
    for number in sorted(settings.patterns, reverse=True):
        gap = more[f"patterns{number}"]
        if not gap.low <= 0 <= gap.high:
            break
        enough = number
    return Summary(chosen, scores, {name: estimate(values) for name, values in errors.items()}, more, enough)


def to_json(summary: Summary) -> dict[str, Any]:
    """Plain values; an interval that one seed cannot give is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and value != value else value

    found: dict[str, Any] = plain(asdict(summary))
    return found
