"""What the study dropout-or-bn claims, as numbers."""

from __future__ import annotations

from collections.abc import Mapping

from batchlab.lab.claims import Claim
from batchlab.lab.comparison import Estimate, compare_steps
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_or_bn.arms import Arm, named_arms
from batchlab.lab.studies.dropout_or_bn.summary import Summary

__all__ = ["claims"]


def _paces(finished: Finished, arms: Mapping[str, Arm]) -> list[Claim]:
    """Steps of batch norm alone over each arm's own, to the smallest error that is asked for."""
    alone = Arm(True).name
    base, accuracy = finished.runs(alone), 1 - min(finished.settings.targets)
    found = []
    for name, arm in arms.items():
        if name == alone or arm.convolutional:
            continue
        steps = compare_steps(base, finished.runs(name), accuracy)
        ratio = None if None in (*steps.baseline, *steps.other) else steps.ratio
        found.append(Claim(f"{arm.label}: batch norm's steps over its own", ratio))
    return found


def claims(finished: Finished, summary: Summary) -> list[Claim]:
    """Test errors of one instead of the other, and of both; what recalibration changes; steps."""
    arms = named_arms(finished.settings)

    def all_of(text: str, values: Mapping[str, Estimate]) -> list[Claim]:
        return [Claim(f"{arms[name].label}: {text}, points", values[name], 0.0, percent=True) for name in values]

    repairs = {name: found.repair for name, found in summary.statistics.items() if arms[name].share}
    return [
        *all_of("error of batch norm alone less its own", summary.instead),
        *all_of("error less that of neither", summary.to_neither),
        *all_of("error less that of batch norm alone", summary.to_batch_norm),
        *all_of("what recalibration adds to the error", repairs),
        *all_of("error less that of independent dropout", summary.to_independent),
        *_paces(finished, arms),
    ]
