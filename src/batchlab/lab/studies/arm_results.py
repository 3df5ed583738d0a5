"""How the arms of a study learned, each compared with one of them: accuracy, steps and seconds to a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from batchlab.lab.comparison import (
    Estimate,
    StepsToTarget,
    compare_steps,
    estimate,
    final_score,
    mean_curve,
    paired_difference,
)
from batchlab.lab.figures import accuracy_curves, rate_search
from batchlab.lab.records import RunRecord
from batchlab.lab.report import Table
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.search import Scores
from batchlab.lab.studies.sentences import percent, points

__all__ = ["ArmResult", "accuracy_table", "arm_figures", "arm_results", "seconds_per_step", "steps_table"]

CHANCE = 0.1
"""Accuracy of a network that guesses one of ten classes, which a run that diverged ends with."""


@dataclass(frozen=True)
class ArmResult:
    """One arm against the baseline.

    Args:
        accuracy: on the test images, mean over the evaluations of the last tenth of the steps.
        gain: paired difference of it to the baseline's; None for the baseline itself.
        steps: to each target; the baseline's own are the `baseline` of each.
        seconds_per_step: of one core's time; None where it was not recorded.
    """

    accuracy: Estimate
    gain: Estimate | None
    steps: tuple[StepsToTarget, ...]
    seconds_per_step: float | None


def _accuracy(record: RunRecord) -> float:
    return CHANCE if record.diverged else final_score(record, 0.1)


def seconds_per_step(records: Sequence[RunRecord]) -> list[float]:
    """Seconds of one core for a step of each run; empty if one was not recorded."""
    found = [r.timing["processor_seconds"] / r.result["steps"] for r in records if r.timing and r.result["steps"]]
    return found if len(found) == len(records) else []


def arm_results(finished: Finished, baseline: str, targets: Sequence[float]) -> dict[str, ArmResult]:
    """Every arm of a finished study, compared seed by seed with the baseline."""
    first = finished.runs(baseline)
    results = {}
    for name in finished.chosen:
        runs = finished.runs(name)
        scores = [_accuracy(record) for record in runs]
        paces = seconds_per_step(runs)
        results[name] = ArmResult(
            accuracy=estimate(scores),
            gain=None if name == baseline else paired_difference([_accuracy(record) for record in first], scores),
            steps=tuple(compare_steps(first, runs, target) for target in targets),
            seconds_per_step=fmean(paces) if paces else None,
        )
    return results


def accuracy_table(
    results: Mapping[str, ArmResult], labels: Mapping[str, str], chosen: Mapping[str, float], caption: str
) -> Table:
    """Each arm's rate, test accuracy, difference to the baseline and milliseconds of a step."""
    rows = []
    for name, result in results.items():
        gain = "–" if result.gain is None else points(result.gain)
        cost = "–" if result.seconds_per_step is None else f"{1000 * result.seconds_per_step:.2g}"
        rows.append([labels[name], f"{chosen[name]:g}", percent(result.accuracy), gain, cost])
    header = ["arm", "learning rate", "test accuracy", "more than the baseline, points", "ms a step"]
    return Table(header, rows, caption)


def _reached(values: Sequence[float | None], unit: str = "") -> str:
    got = [value for value in values if value is not None]
    if not got:
        return "never"
    text = f"{float(f'{fmean(got):.3g}'):,.3g}" if fmean(got) < 100 else f"{float(f'{fmean(got):.3g}'):,.0f}"
    return f"{text}{unit}" if len(got) == len(values) else f"{text}{unit} ({len(got)} of {len(values)} runs)"


def _fewer(ratio: float) -> str:
    """How many times fewer steps; a ratio below 1 means more."""
    return f"{ratio:.1f} times fewer" if ratio >= 1 else f"{1 / ratio:.1f} times more"


def steps_table(
    results: Mapping[str, ArmResult], labels: Mapping[str, str], caption: str, seconds: bool = False
) -> Table:
    """Steps to each target, or seconds of one core, means over the runs that reached it."""
    rows = []
    targets: list[float] = []
    for name, result in results.items():
        targets = [row.target or 0.0 for row in result.steps]
        pace = result.seconds_per_step if seconds else 1.0
        cells = []
        for row in result.steps:
            values = [None if n is None or pace is None else n * pace for n in row.other]
            shown = "" if row.ratio is None or seconds or result.gain is None else f", {_fewer(row.ratio.mean)}"
            cells.append(_reached(values) + shown)
        rows.append([labels[name], *cells])
    return Table(["arm", *(f"{100 * target:g} %" for target in targets)], rows, caption)


def arm_figures(finished: Finished, labels: Mapping[str, str], scores: Scores, floor: float = 0.5) -> dict[str, str]:
    """Accuracy against steps, and the search for learning rates, from `floor` up; at most eight arms."""
    curves = {}
    for name in finished.chosen:
        runs = [record for record in finished.runs(name) if not record.diverged]
        if runs:
            curves[labels[name]] = mean_curve(runs)
    return {
        "accuracy": accuracy_curves(
            "accuracy", curves, floor=floor, description="Test accuracy against training steps for " + ", ".join(curves)
        ),
        "rate-search": rate_search(
            "rate-search",
            {labels[arm]: rates for arm, rates in scores.items()},
            {labels[arm]: rate for arm, rate in finished.chosen.items()},
            floor=floor,
            description="Validation accuracy against learning rate for each arm, the chosen rate ringed",
        ),
    }
