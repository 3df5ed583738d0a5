"""What the study rectifiers claims, as numbers."""

from __future__ import annotations

from batchlab.lab.claims import Claim
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.rectifiers.settings import NORMALIZATIONS, STARTS, RectifiersSettings, cell
from batchlab.lab.studies.rectifiers.summary import Summary, gain

__all__ = ["claims"]


def claims(finished: Finished, summary: Summary) -> list[Claim]:
    """At each depth: what He's start, PReLU and batch norm add to the accuracy."""
    settings: RectifiersSettings = finished.settings
    found = []

    def add(text: str, other: str, baseline: str) -> None:
        value = gain(summary, other, baseline)
        found.append(Claim(f"{text}: accuracy more at the end, points", value, 0.0, percent=True))

    for depth in settings.depths:
        for norm, words in NORMALIZATIONS.items():
            pairs = {
                "ReLU, He's start against Xavier's": ("relu_he", "relu_xavier"),
                "He's start, PReLU against ReLU": ("prelu_he", "relu_he"),
                "ReLU, He's start, against sigmoid": ("relu_he", "sigmoid"),
            }
            for text, (other, baseline) in pairs.items():
                add(f"{depth} layers {words}, {text}", cell(other, depth, norm), cell(baseline, depth, norm))
        for start, of in STARTS.items():
            text = f"{depth} layers, {of.label}, with batch norm against without"
            add(text, cell(start, depth, "batch_norm"), cell(start, depth, "none"))
    return found
