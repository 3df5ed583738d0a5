"""Sentences and verdicts of the study learning-rates, from its numbers."""

from __future__ import annotations

from collections.abc import Iterable

from batchlab.lab.studies.learning_rates.settings import (
    ACTIVATIONS,
    BASELINE,
    SCALE_FREE,
    LearningRatesSettings,
    arm,
    label,
)
from batchlab.lab.studies.learning_rates.summary import Condition, Limits, Summary, Times

__all__ = ["answer", "at_baseline", "factor", "growth_sentence", "number", "open_ends", "span", "verdict"]


def number(value: float) -> str:
    """Two digits, or whole: 3.3, 10, 333."""
    return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"


def span(found: Limits) -> str:
    """Between which rates an arm trains: from 0.001 to 0.3."""
    if found.lowest is None or found.highest is None:
        return "at no rate tried"
    if found.lowest == found.highest and not found.open_below and not found.open_above:
        return f"at {found.lowest:g} alone"
    low = f"{found.lowest:g}{' or less' if found.open_below else ''}"
    high = f"{found.highest:g}{' or more' if found.open_above else ''}"
    return f"from {low} to {high}"


def factor(found: Times) -> str:
    """How many times as large, with its bounds: 10 times (3.3 to 33)."""
    high = "more" if found.high is None else number(found.high)
    return f"{number(found.factor)} times ({number(found.low)} to {high})"


def verdict(found: Times, seeds: int) -> str:
    """What the bounds say."""
    if seeds == 1:
        return "one run a rate, so without a verdict"
    return "clearly larger" if found.larger else "clearly smaller" if found.smaller else "no clear difference"


def _sum_up(settings: LearningRatesSettings, activation: str, condition: Condition) -> str:
    first, batch_norm = arm(activation, BASELINE), arm(activation, "batch_norm")
    text = (
        f"With {ACTIVATIONS[activation][0]} units the network trains without a mechanism "
        f"{span(condition.limits[first])}, with batch norm {span(condition.limits[batch_norm])}; its best rate is "
        f"{condition.chosen[first]:g} without, {condition.chosen[batch_norm]:g} with batch norm."
    )
    found = condition.largest.get(batch_norm)
    if found is None:
        return text
    return f"{text} Batch norm's largest rate is {factor(found)} as large: {verdict(found, settings.search_seeds)}."


def _listed(names: Iterable[str], condition: Condition) -> str:
    factors = {name: number(condition.largest[name].factor) for name in names}
    return ", ".join(f"{label(name)} ({'equal' if size == '1' else f'{size} times'})" for name, size in factors.items())


def _others(settings: LearningRatesSettings, activation: str, condition: Condition) -> str:
    """The other arms by how their largest rate compares with the baseline's."""
    seeds = settings.search_seeds
    first, known = arm(activation, BASELINE), arm(activation, "batch_norm")
    parts = []
    for word in ("clearly larger", "no clear difference", "clearly smaller", "one run a rate, so without a verdict"):
        names = [n for n, found in condition.largest.items() if n != known and verdict(found, seeds) == word]
        if names:
            parts.append(f"{word} for {_listed(names, condition)}")
    if condition.limits[first].lowest is not None:
        nowhere = [label(n) for n, found in condition.limits.items() if n != known and found.lowest is None]
        parts += [f"no rate trains every run of {', '.join(nowhere)}"] if nowhere else []
    if not parts:
        return f"{ACTIVATIONS[activation][0]} units: there is nothing else to compare."
    return (
        f"The other mechanisms' largest rate with {ACTIVATIONS[activation][0]} units, against that without a "
        f"mechanism: {'; '.join(parts)}."
    )


def answer(settings: LearningRatesSettings, summary: Summary) -> list[str]:
    """The sentences that open the report."""
    runs = "in its one run" if settings.search_seeds == 1 else f"in each of {settings.search_seeds} runs"
    opening = (
        f"A rate trains a network here if {100 * settings.goal:g} % of held-out images are recognized after "
        f"{settings.search_steps:,} steps, {runs}."
    )
    sums = [_sum_up(settings, activation, condition) for activation, condition in summary.conditions.items()]
    others = [_others(settings, activation, condition) for activation, condition in summary.conditions.items()]
    return [f"{opening} {sums[0]}", *sums[1:], *others]


def at_baseline(settings: LearningRatesSettings, condition: Condition, activation: str) -> str:
    """Batch norm and the baseline, both at the baseline's best rate: is a larger rate needed for its gain?"""
    own = condition.chosen[arm(activation, BASELINE)]
    found = condition.at_baseline[arm(activation, "batch_norm")]
    size = f"{100 * found.mean:+.1f} points"
    if settings.search_seeds == 1:
        return f"{size} at {own:g} (one seed)"
    clear = (
        "no clear difference" if found.low <= 0 <= found.high else "clearly more" if found.mean > 0 else "clearly less"
    )
    return f"{size} ({100 * found.low:+.1f} to {100 * found.high:+.1f}) at {own:g}: {clear}"


def growth_sentence(condition: Condition, name: str) -> str:
    """How much the hidden weights of an arm grew at its largest rate, and what that makes of the rate."""
    rate = condition.limits[name].highest
    growth = None if rate is None else condition.growth[name].get(rate)
    if rate is None or growth is None:
        return f"{label(name)} trains at no rate, or left no weights to measure"
    text = f"{label(name)}: {number(growth)} times as long at the end, at {rate:g}"
    if name.split("_", 1)[1] in SCALE_FREE:
        text += f", so they turn as if it were {number(rate / growth**2)}"
    return text


def open_ends(settings: LearningRatesSettings, summary: Summary) -> str:
    """Which arms' limits or best rates lie outside of what was tried; empty if none do."""
    rates = sorted(settings.rates)
    ends, best = [], []
    for activation, condition in summary.conditions.items():
        kind = ACTIVATIONS[activation][0]
        for name, found in condition.limits.items():
            if found.open_below or found.open_above:
                sides = [side for side, is_open in (("down", found.open_below), ("up", found.open_above)) if is_open]
                ends.append(f"{label(name)}, {kind} ({' and '.join(sides)})")
            if condition.chosen[name] in (rates[0], rates[-1]):
                best.append(f"{label(name)}, {kind}")
    parts = []
    if ends:
        parts.append(f"These ranges may go on beyond the rates tried: {'; '.join(ends)}.")
    if best:
        parts.append(f"The best rate is the smallest or the largest tried for: {'; '.join(best)}.")
    return " ".join(parts)
