"""Figures of the study factorization."""

from __future__ import annotations

from typing import Final

from batchlab.lab.comparison import mean_curve
from batchlab.lab.figures import accuracy_curves, interval_rows, rate_search
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.factorization.settings import (
    ARMS,
    BASELINE,
    LABELS,
    REFERENCE,
    STARTS,
    FactorizationSettings,
    full_name,
)
from batchlab.lab.studies.factorization.summary import Summary

__all__ = ["PANELS", "figures"]

# The plain network and batch norm come first in both, so that they keep their colours.
PANELS: Final[dict[str, tuple[str, ...]]] = {
    "weights": tuple(name for name, arm in ARMS.items() if name in (BASELINE, REFERENCE) or arm.looks_at == "weights"),
    "activations": tuple(name for name, arm in ARMS.items() if name == BASELINE or arm.looks_at != "weights"),
}
"""All arms are too many for one figure: those that look at weights alone, and those with statistics."""


def _accuracy(finished: Finished, start: str, panel: str) -> str | None:
    curves = {}
    for name in PANELS[panel]:
        runs = [record for record in finished.runs(full_name(name, start)) if not record.diverged]
        if runs:
            curves[LABELS[name]] = mean_curve(runs)
    if not curves:
        return None
    best = max(max(curve.mean) for curve in curves.values())
    return accuracy_curves(
        f"accuracy-{panel}-{start}",
        curves,
        floor=max(0.0, round(best - 0.25, 1)),
        description=f"Test accuracy against training steps from {STARTS[start]} for " + ", ".join(curves),
    )


def _search(finished: Finished, start: str, panel: str) -> str:
    found = {LABELS[name]: finished.scores[full_name(name, start)] for name in PANELS[panel]}
    best = max(score for rates in found.values() for values in rates.values() for score in values)
    return rate_search(
        f"rate-search-{panel}-{start}",
        found,
        {LABELS[name]: finished.chosen[full_name(name, start)] for name in PANELS[panel]},
        floor=max(0.0, best - 0.25),
        description=f"Validation accuracy against learning rate for each arm from {STARTS[start]}",
    )


def _shares(summary: Summary) -> str | None:
    groups = {
        STARTS[start]: {LABELS[name]: share for name, share in found.shares.items()}
        for start, found in summary.starts.items()
        if found.shares
    }
    if not groups:
        return None
    return interval_rows(
        "shares",
        groups,
        [LABELS[name] for name in ARMS if name not in (BASELINE, REFERENCE)],
        x_label="share of batch norm's gain in training steps",
        levels={LABELS[BASELINE]: 0.0, LABELS[REFERENCE]: 1.0},
        description="Share of batch norm's gain that each arm keeps, with 95 % intervals, from each start",
    )


def figures(finished: Finished, summary: Summary) -> dict[str, str]:
    """All figures: shares, accuracy and rates; those that nothing can be shown in are left out."""
    settings: FactorizationSettings = finished.settings
    drawn: dict[str, str | None] = {"shares": _shares(summary)}
    for start in settings.starts:
        for panel in PANELS:
            drawn[f"accuracy-{panel}-{start}"] = _accuracy(finished, start, panel)
            drawn[f"rate-search-{panel}-{start}"] = _search(finished, start, panel)
    return {name: svg for name, svg in drawn.items() if svg is not None}
