"""What the records of the study bn-mnist say, as numbers: everything that its report and README quote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchlab.lab.comparison import Estimate, StepsToTarget, compare_steps, estimate, paired_difference
from batchlab.lab.records import RunRecord
from batchlab.lab.studies.bn_mnist.settings import BnMnistSettings
from batchlab.lab.studies.search import arm_records

__all__ = ["Comparison", "Summary", "summarize"]


@dataclass(frozen=True)
class Comparison:
    """Two arms over the same seeds.

    Args:
        baseline: name and rate of the arm without batch norm.
        other: name and rate of the arm with it.
        steps: to the baseline's best accuracy, then to each target.
        accuracy: of baseline and other after the last step.
        gain: paired difference of these, other - baseline.
        headline: the hardest target that every run of both reached; else the baseline's best accuracy, if every run of
            the other reached it; else None.
    """

    baseline: tuple[str, float]
    other: tuple[str, float]
    steps: tuple[StepsToTarget, ...]
    accuracy: tuple[Estimate, Estimate]
    gain: Estimate
    headline: StepsToTarget | None


@dataclass(frozen=True)
class Summary:
    """All numbers of the study.

    Args:
        chosen: each arm's best rate.
        scores: of the search: arm -> rate -> validation accuracy of each seed.
        comparisons: "own" (each at its own best rate), "same" (both at the baseline's best rate) and, with the control
            arms, "well_scaled".
        inference: running_average, recalibrated, folded -> accuracy of the same weights.
        folded_difference: the largest difference of an output between the folded and the recalibrated network.
        wander: how far the median of one unit's input went during training (highest minus lowest): "none", and
            "batch_norm" at the "same" rate and at its "own".
        seconds_per_step: arm -> training seconds of one step, None where they were not recorded.
        best_run: the final run with the highest test accuracy, for the gallery.
    """

    chosen: dict[str, float]
    scores: dict[str, dict[float, list[float]]]
    comparisons: dict[str, Comparison]
    inference: dict[str, Estimate]
    folded_difference: float
    wander: dict[str, Estimate]
    seconds_per_step: dict[str, float | None]
    best_run: str


def _accuracy(record: RunRecord) -> float:
    # A run that diverged ends with a network that guesses.
    return 0.1 if record.diverged else float(record.result["accuracy"])


def _compare(
    settings: BnMnistSettings, records: Mapping[str, RunRecord], baseline: tuple[str, float], other: tuple[str, float]
) -> Comparison:
    first, second = (arm_records(settings, records, *arm) for arm in (baseline, other))
    steps = tuple(compare_steps(first, second, target) for target in (None, *settings.targets))
    reached = [row for row in steps if None not in (*row.baseline, *row.other)]
    finals = [[_accuracy(record) for record in arm] for arm in (first, second)]
    return Comparison(
        baseline,
        other,
        steps,
        (estimate(finals[0]), estimate(finals[1])),
        paired_difference(*finals),
        max(reached, key=lambda row: row.target or 0, default=None),
    )


def _wander(records: Sequence[RunRecord]) -> Estimate:
    """Over seeds; within a seed the mean over the recorded units."""
    ranges = []
    for record in records:
        medians = [[unit[1] for unit in line["percentiles"]] for line in record.metrics]
        ranges.append([max(values) - min(values) for values in zip(*medians, strict=True)])
    return estimate([sum(values) / len(values) for values in ranges])


def _seconds_per_step(records: Sequence[RunRecord]) -> float | None:
    if not all(record.timing for record in records):
        return None
    return float(sum(r.timing["training_seconds"] for r in records) / sum(r.result["steps"] for r in records))


def summarize(
    settings: BnMnistSettings,
    records: Mapping[str, RunRecord],
    chosen: dict[str, float],
    scores: dict[str, dict[float, list[float]]],
) -> Summary:
    """Compute the summary of a finished study from its records (by the names of `search.run_name`)."""
    none, own = ("none", chosen["none"]), ("batch_norm", chosen["batch_norm"])
    comparisons = {
        "own": _compare(settings, records, none, own),
        "same": _compare(settings, records, none, ("batch_norm", chosen["none"])),
    }
    if "none_well_scaled" in chosen:
        scaled = [(name, chosen[name]) for name in ("none_well_scaled", "batch_norm_well_scaled")]
        comparisons["well_scaled"] = _compare(settings, records, scaled[0], scaled[1])
    normalized = [r for r in arm_records(settings, records, *own) if not r.diverged]
    kinds = ("running_average", "recalibrated", "folded")
    finals = {name: record for name, record in records.items() if name.startswith("runs/final/")}
    return Summary(
        chosen=chosen,
        scores=scores,
        comparisons=comparisons,
        inference={k: estimate([r.result["inference"][k] for r in normalized]) for k in kinds} if normalized else {},
        folded_difference=max((r.result["inference"]["folded_difference"] for r in normalized), default=0.0),
        wander={
            name: _wander(arm_records(settings, records, arm, rate))
            for name, (arm, rate) in {"none": none, "same": ("batch_norm", chosen["none"]), "own": own}.items()
        },
        seconds_per_step={
            arm: _seconds_per_step(arm_records(settings, records, arm, rate)) for arm, rate in (none, own)
        },
        best_run=max(sorted(finals), key=lambda name: _accuracy(finals[name])),
    )
