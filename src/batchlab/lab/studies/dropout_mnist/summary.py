"""What the records of the study dropout-mnist say, as numbers: everything that its report and README quote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from batchlab.lab.comparison import Estimate, estimate, final_error, paired_difference, paired_ratio, steps_to_target
from batchlab.lab.records import RunRecord
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_mnist.settings import ARMS, DropoutMnistSettings
from batchlab.lab.studies.search import Scores

__all__ = ["Summary", "Target", "summarize"]


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


def summarize(finished: Finished) -> Summary:
    """Compute the summary of a finished study from its records."""
    settings: DropoutMnistSettings = finished.settings
    arms = {name: finished.runs(name) for name in ARMS}
    errors = {name: [final_error(record) for record in runs] for name, runs in arms.items()}
    pairs = [("batchwise", "independent"), ("independent", "none"), ("batchwise", "none"), ("none", "small")]
    epoch = finished.training_images / settings.batch_size
    pace = {name: [_seconds_per_step(record) for record in runs] for name, runs in arms.items()}
    timed = {name: [p for p in found if p] for name, found in pace.items()}
    complete = all(len(found) == settings.seeds for found in timed.values())
    small = arms["small"]
    return Summary(
        chosen=finished.chosen,
        scores=finished.scores,
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
