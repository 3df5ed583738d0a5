"""The study dropout-or-bn in sentences: whatever the numbers say, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Iterable

from batchlab.lab.comparison import Estimate
from batchlab.lab.studies.dropout_or_bn.arms import Arm, named_arms
from batchlab.lab.studies.dropout_or_bn.settings import DropoutOrBnSettings
from batchlab.lab.studies.dropout_or_bn.summary import Summary
from batchlab.lab.studies.sentences import difference, percent

__all__ = ["answer", "details", "edge_sentence", "expected_text", "verdicts"]


def _sign(value: Estimate) -> int:
    """1 for clearly more, -1 for clearly fewer, 0 if the interval does not tell, or there is none."""
    if math.isnan(value.low) or value.low <= 0 <= value.high:
        return 0
    return 1 if value.mean > 0 else -1


def _list(words: Iterable[str]) -> str:
    found = list(words)
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def _names(settings: DropoutOrBnSettings) -> tuple[list[str], str]:
    """The arms with dropout alone, and the one with both that the answer is about."""
    alone = [Arm(False, "independent", share).name for share in settings.shares]
    return alone, Arm(True, "independent", settings.shares[-1]).name


def _replace(settings: DropoutOrBnSettings, summary: Summary) -> str:
    alone, _ = _names(settings)
    errors, arms = summary.errors, named_arms(settings)
    dropout = _list(f"{percent(errors[name])} with {arms[name].label}" for name in alone)
    signs = {_sign(summary.instead[name]) for name in alone}
    if settings.seeds == 1:
        verdict = "One run each does not tell how sure that is"
    elif signs == {-1}:
        verdict = "Batch norm alone is better than dropout alone here"
    elif signs == {1}:
        verdict = "Batch norm alone does not replace dropout here"
    elif signs == {0}:
        verdict = "Which of the two alone is better, these runs do not tell"
    else:
        verdict = "Which of the two alone is better depends on the share that is dropped"
    against = "; ".join(f"against {arms[name].label} {difference(summary.instead[name])}" for name in alone)
    return (
        f"Trained on {summary.images:,} images, the network gets {percent(errors['none'])} of the test images wrong "
        f"with neither, {dropout}, and {percent(errors['bn'])} with batch norm. {verdict}: {against}."
    )


def _both(settings: DropoutOrBnSettings, summary: Summary) -> str:
    _, both = _names(settings)
    found = [value for name, value in summary.to_batch_norm.items() if not named_arms(settings)[name].convolutional]
    better, worse = (sum(_sign(value) == sign for value in found) for sign in (-1, 1))
    count = (
        ""
        if settings.seeds == 1
        else f" Of the {len(found)} ways to have both, {better} {'is' if better == 1 else 'are'} clearly better than "
        f"batch norm alone and {worse} clearly worse."
    )
    return (
        f"With both, dropout {settings.shares[-1]:g} between the layers, it is {percent(summary.errors[both])}: "
        f"against batch norm alone {difference(summary.to_batch_norm[both])}, against dropout alone "
        f"{difference(summary.to_dropout[both])}.{count}"
    )


def expected_text(value: float | None) -> str:
    """What theory expects of a shift, where it says something."""
    return "–" if value is None else f"{value:.2f}"


def _shift(settings: DropoutOrBnSettings, summary: Summary) -> str:
    parts = []
    for place, where in (("hidden", "between the layers"), ("before_normalization", "directly in front of it")):
        found = summary.statistics.get(Arm(True, "independent", settings.shares[-1], place).name)
        if found is not None:
            layer = max(found.expected, key=lambda name: found.expected[name])
            parts.append(f"{found.variance[layer]:.2f} times ({where}; theory {found.expected[layer]:.2f})")
    repairs = [
        found.repair
        for name, found in summary.statistics.items()
        if named_arms(settings)[name].share and not named_arms(settings)[name].convolutional
    ]
    if not parts or not repairs:
        return "The shift of the variance was not measured: the runs with both diverged."
    low, high = min(repairs, key=lambda e: e.mean), max(repairs, key=lambda e: e.mean)
    clear = sum(_sign(value) == -1 for value in repairs)
    sure = "" if settings.seeds == 1 else f", clearly for the better in {clear} of {len(repairs)}"
    return (
        f"Dropout {settings.shares[-1]:g} puts the variance that batch norm divides by off by {_list(parts)}. What "
        "that costs shows when the statistics are taken again with dropout off: over all ways to have both, the test "
        f"error changes by {100 * low.mean:+.2f} to {100 * high.mean:+.2f} percentage points{sure}."
    )


def answer(settings: DropoutOrBnSettings, summary: Summary) -> list[str]:
    """The sentences that open the report: one instead of the other; both; the shift."""
    return [_replace(settings, summary), _both(settings, summary), _shift(settings, summary)]


def _explained(settings: DropoutOrBnSettings, summary: Summary) -> str:
    """Where both are worse than batch norm alone: how much of it the statistics are to blame for."""
    arms = named_arms(settings)
    parts = [
        f"{arms[name].label}: {100 * value.mean:+.2f} points, of which recalibration takes back "
        f"{0.0 - round(100 * summary.statistics[name].repair.mean, 2):.2f}"
        for name, value in summary.to_batch_norm.items()
        if _sign(value) == 1 and name in summary.statistics
    ]
    if settings.seeds == 1:
        return ""
    if not parts:
        return "No way to have both is clearly worse than batch norm alone, so there is no harm for a shift to explain."
    return f"Clearly worse than batch norm alone: {'; '.join(parts)}."


def _related(summary: Summary) -> str:
    if summary.correlation is None:
        return ""
    return (
        "Over the multilayer perceptrons with both, the correlation of the largest shift (its logarithm) with the "
        f"change of the error by recalibration is {summary.correlation:+.2f}; below 0 means that larger shifts are "
        "repaired more."
    )


def details(settings: DropoutOrBnSettings, summary: Summary) -> list[str]:
    """What the tables show about the fixes and about batchwise dropout, a paragraph each."""
    errors, share = summary.errors, settings.shares[-1]
    last = Arm(True, "independent", share, "last").name
    batchwise, both = Arm(False, "batchwise", share).name, Arm(True, "batchwise", share).name
    fix = (
        f"Dropout {share:g} after the last batch norm only, as Li et al. propose: {percent(errors[last])}. Against "
        f"dropout between the layers {difference(summary.to_hidden[last])}; against batch norm alone "
        f"{difference(summary.to_batch_norm[last])}. It also drops fewer units, which this comparison cannot tell "
        "apart from the place."
    )
    whole = (
        f"Batchwise dropout {share:g} alone: {percent(errors[batchwise])}, against independent dropout "
        f"{difference(summary.to_independent[batchwise])}. With batch norm, between the layers: "
        f"{percent(errors[both])}, against batch norm alone {difference(summary.to_batch_norm[both])}."
    )
    return [text for text in (_explained(settings, summary), _related(summary), fix, whole) if text]


def edge_sentence(settings: DropoutOrBnSettings, summary: Summary) -> str:
    """Whether a better rate could lie outside of what was tried."""
    if len(settings.rates) == 1:
        return f"Only the rate {settings.rates[0]:g} was tried, so a better one may lie anywhere."
    if not summary.at_edge:
        return "Every chosen rate has a smaller and a larger one beside it that was tried and is worse."
    arms = named_arms(settings)
    names = "; ".join(f"{arms[name].label} ({summary.chosen[name]:g})" for name in summary.at_edge)
    return f"The best rate is the smallest or the largest tried, so a better one may lie outside, for: {names}."


def verdicts(settings: DropoutOrBnSettings, summary: Summary) -> list[list[str]]:
    """What the papers say, and what was found: rows of a table."""
    share = settings.shares[-1]
    hidden = Arm(True, "independent", share).name
    last = Arm(True, "independent", share, "last").name
    found = summary.statistics.get(hidden)
    shift = repair = "not measured: the runs diverged"
    if found is not None:
        layer = max(found.expected, key=lambda name: found.expected[name])
        shift = f"{found.variance[layer]:.2f} times, theory {expected_text(found.expected[layer])}"
        repair = difference(found.repair)
    rows = [
        [
            "batch norm makes dropout unnecessary (Ioffe & Szegedy 2015): both against batch norm alone",
            difference(summary.to_batch_norm[hidden]),
        ],
        ["dropout between the layers shifts batch norm's variance (Li et al. 2018)", shift],
        ["the shift costs accuracy (Li et al.): recalibrated against running averages", repair],
        [
            "dropout after the last batch norm does not harm (Li et al.): against batch norm alone",
            difference(summary.to_batch_norm[last]),
        ],
    ]
    if settings.channels:
        conv = Arm(True, "independent", settings.channel_share, convolutional=True)
        rows += [
            [
                f"convolutional network, batch norm against dropout {settings.channel_share:g}",
                difference(summary.instead[conv.without_batch_norm().name]),
            ],
            ["convolutional network, both against batch norm alone", difference(summary.to_batch_norm[conv.name])],
        ]
    return rows
