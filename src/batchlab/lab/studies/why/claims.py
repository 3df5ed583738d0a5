"""What the study why claims, as numbers."""

from __future__ import annotations

from batchlab.lab.claims import Claim
from batchlab.lab.comparison import Estimate
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.why.settings import NETWORKS, arm_of
from batchlab.lab.studies.why.summary import Summary

__all__ = ["claims"]

MEASURED = (
    ("batch norm: gradient shift over that of none, own rates", "batch_norm", "relative_shift", "own"),
    ("batch norm: gradient shift over that of none, one rate", "batch_norm", "relative_shift", "common"),
    ("batch norm: shift of the inputs' means over that of none", "batch_norm", "moved", "own"),
    ("noisy batch norm: gradient shift over that of none", "noisy_batch_norm", "relative_shift_anew", "own"),
    ("batch norm: range of the loss along a step over that of none", "batch_norm", "loss_range", "common"),
    ("batch norm: change of the gradient along a step over that of none", "batch_norm", "change", "common"),
    ("batch norm: effective smoothness over that of none", "batch_norm", "smoothness", "common"),
)
"""Text, normalization, measure, and at which rates; all while the training loss is the same."""


def _fewer(summary: Summary, network: str, normalization: str) -> Estimate | None:
    """Steps of none over its own, to the hardest accuracy that every run of the network reached."""
    result = summary.results[network][arm_of(network, normalization)]
    target = summary.targets[network]
    return next((row.ratio for row in result.steps if target is not None and row.target == target), None)


def claims(finished: Finished, summary: Summary) -> list[Claim]:  # noqa: ARG001
    """Shift, landscape and steps, for each network."""
    found = []
    for network, name in NETWORKS.items():
        for text, normalization, measure, rates in MEASURED:
            measured = summary.parts[network][rates]["same loss"][normalization].get(measure)
            found.append(Claim(f"{name}, {text}", None if measured is None else measured.ratio))
        for normalization, text in (("batch_norm", "batch norm"), ("noisy_batch_norm", "noisy batch norm")):
            found.append(Claim(f"{name}, {text}: steps of none over its own", _fewer(summary, network, normalization)))
    return found
