"""What the records of the study dropout-mnist say, as numbers: everything that its report and README quote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from batchlab.lab.comparison import Estimate, estimate, final_score, paired_difference, paired_ratio, steps_to_target
from batchlab.lab.records import RunRecord
from batchlab.lab.studies.dropout_mnist.settings import ARMS, DropoutMnistSettings
from batchlab.lab.studies.search import Scores, run_name

__all__ = ["LAST", "Summary", "Target", "arm_records", "summarize", "to_json"]

LAST = 0.1
"""A run's test error is the mean over the evaluations in this last share of its steps: a single one is noisy."""


@dataclass(frozen=True)
class Target:
    """How the arms reach a test error.

    Args:
        error: the target.
        steps: arm -> steps of each seed, None where it was never reached.
        seconds: arm -> seconds of one core that each seed trained until then.
    """

    error: float
    steps: dict[str, tuple[int | None, ...]]
    seconds: dict[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Summary:
    """All numbers of the study.

    Args:
        chosen: each arm's best rate.
        scores: of the search.
        errors: arm -> test error at the end.
        differences: "other - baseline" -> paired difference of test errors.
        seconds_per_epoch: arm -> seconds of one core for as many images as there are, None where not recorded.
        speedup: "independent" and "none" -> their seconds divided by batchwise dropout's, paired by seed.
        targets: how the arms get to a test error.
        first_without_errors: epoch at which each seed's small network first made no error on its training images.
        errors_at_epoch_20: training images that each seed's small network got wrong then; empty for shorter runs.
    """

    chosen: dict[str, float]
    scores: Scores
    errors: dict[str, Estimate]
    differences: dict[str, Estimate]
    seconds_per_epoch: dict[str, float | None]
    speedup: dict[str, Estimate]
    targets: tuple[Target, ...]
    first_without_errors: tuple[float | None, ...]
    errors_at_epoch_20: tuple[int, ...]


def arm_records(
    settings: DropoutMnistSettings, records: Mapping[str, RunRecord], chosen: Mapping[str, float], arm: str
) -> list[RunRecord]:
    """The final runs of an arm, by seed."""
    return [records[run_name("final", arm, chosen[arm], seed)] for seed in range(settings.seeds)]


def final_error(record: RunRecord) -> float:
    """Share of the test images that are recognized wrongly at the end; 0.9 for a run that diverged."""
    return 0.9 if record.diverged else 1 - final_score(record, LAST)


def _seconds_per_step(record: RunRecord) -> float | None:
    """Of one core's time: the clock would count what else the machine did."""
    return record.timing["processor_seconds"] / record.result["steps"] if record.timing else None


def _target(error: float, arms: Mapping[str, Sequence[RunRecord]]) -> Target:
    steps: dict[str, tuple[int | None, ...]] = {}
    seconds: dict[str, tuple[float | None, ...]] = {}
    for name, runs in arms.items():
        steps[name] = tuple(steps_to_target(record, 1 - error) for record in runs)
        pace = [_seconds_per_step(record) for record in runs]
        seconds[name] = tuple(n * p if n and p else None for n, p in zip(steps[name], pace, strict=True))
    return Target(error, steps, seconds)


def _first_without_errors(record: RunRecord, epoch: float) -> float | None:
    return next((line["step"] / epoch for line in record.metrics if line.get("training_errors") == 0), None)


def summarize(
    settings: DropoutMnistSettings,
    records: Mapping[str, RunRecord],
    chosen: dict[str, float],
    scores: Scores,
    training_images: int,
) -> Summary:
    """Compute the summary of a finished study from its records."""
    arms = {name: arm_records(settings, records, chosen, name) for name in ARMS}
    errors = {name: [final_error(record) for record in runs] for name, runs in arms.items()}
    pairs = [("batchwise", "independent"), ("independent", "none"), ("batchwise", "none"), ("none", "small")]
    epoch = training_images / settings.batch_size
    pace = {name: [_seconds_per_step(record) for record in runs] for name, runs in arms.items()}
    timed = {name: [p for p in found if p] for name, found in pace.items()}
    complete = all(len(found) == settings.seeds for found in timed.values())
    small = arms["small"]
    return Summary(
        chosen=chosen,
        scores=scores,
        errors={name: estimate(values) for name, values in errors.items()},
        differences={f"{b} - {a}": paired_difference(errors[a], errors[b]) for b, a in pairs},
        seconds_per_epoch={name: fmean(found) * epoch if complete else None for name, found in timed.items()},
        speedup={name: paired_ratio(timed[name], timed["batchwise"]) for name in ("independent", "none")}
        if complete
        else {},
        targets=tuple(_target(error, arms) for error in settings.targets),
        first_without_errors=tuple(_first_without_errors(record, epoch) for record in small),
        errors_at_epoch_20=tuple(
            line["training_errors"] for record in small for line in record.metrics if line["step"] == round(20 * epoch)
        ),
    )


def to_json(summary: Summary) -> dict[str, Any]:
    """Plain values; an interval that one seed cannot give is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and value != value else value

    found: dict[str, Any] = plain(asdict(summary))
    return found
