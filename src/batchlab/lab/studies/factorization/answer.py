"""What the numbers of the study factorization say, in sentences and rows."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from batchlab.lab.comparison import Estimate
from batchlab.lab.studies.arm_results import ArmResult
from batchlab.lab.studies.factorization.settings import (
    ARMS,
    BASELINE,
    LABELS,
    REFERENCE,
    STARTS,
    FactorizationSettings,
    full_name,
)
from batchlab.lab.studies.factorization.summary import StartSummary, Summary, at_target
from batchlab.lab.studies.sentences import percent, times

__all__ = ["answer", "ends", "kept", "reached", "search_note", "seconds", "verdict"]


def kept(share: Estimate) -> str:
    """A share with its interval: 40 % (30 to 52)."""
    text = f"{100 * share.mean:.0f} %"
    return text if share.low != share.low else f"{text} ({100 * share.low:.0f} to {100 * share.high:.0f})"


def verdict(share: Estimate) -> str:
    """What the interval of a share says."""
    if share.low != share.low:
        return "one seed, so without an interval"
    if share.low <= 1 <= share.high:
        return "unclear, from nothing to all of it" if share.low <= 0 else "no clear difference to batch norm"
    if share.low > 1:
        return "more than batch norm"
    if share.high < 0:
        return "slower than the plain network"
    return "no clear gain over the plain network" if share.low <= 0 else "a part of it"


def reached(result: ArmResult, target: float) -> str:
    """In how many runs an arm got to the target."""
    other = at_target(result, target).other
    return f"reached in {sum(n is not None for n in other)} of {len(other)} runs"


def _steps(result: ArmResult, target: float) -> float | None:
    """The mean of an arm's steps to the target; None if a run did not get there."""
    got = [n for n in at_target(result, target).other if n is not None]
    return fmean(got) if len(got) == len(at_target(result, target).other) else None


def _count(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(LABELS[name] for name in names)


def _best(found: StartSummary, looks_at: str) -> str | None:
    """The arm of a kind that keeps the most; None if none of them has a share."""
    arms = [name for name in found.shares if ARMS[name].looks_at == looks_at]
    return max(arms, key=lambda arm: found.shares[arm].mean) if arms else None


def _weights_alone(summary: Summary) -> str:
    said = []
    for start, found in summary.starts.items():
        name = _best(found, "weights")
        if name is not None:
            share = found.shares[name]
            said.append(f"from {STARTS[start]} {kept(share)}, {LABELS[name]} ({verdict(share)})")
        elif found.gain is None:
            said.append(f"from {STARTS[start]} there is no accuracy to compare at")
        elif found.gain.low > 1 or found.gain.n == 1 < found.gain.mean:
            said.append(f"from {STARTS[start]} none got there in every run")
        else:
            said.append(f"from {STARTS[start]} batch norm has no clear gain")
    return f"Of batch norm's gain in training steps, arms that look at weights alone keep at best: {'; '.join(said)}."


def _gain(start: str, found: StartSummary) -> str:
    target, gain = found.target, found.gain
    assert target is not None
    assert gain is not None
    plain, reference = (_steps(found.results[name], target) or 0.0 for name in (BASELINE, REFERENCE))
    said = (
        f"From {STARTS[start]} the plain network needs {_count(plain)} steps to recognize {100 * target:g} % of the "
        f"test images and batch norm {_count(reference)}: "
    )
    if gain.low <= 1 <= gain.high:
        return f"{said}batch norm has no clear gain ({times(gain)} fewer), so that no arm has a share of it."
    if gain.mean <= 1:
        return f"{said}batch norm has no gain ({times(gain)} fewer), so that no arm has a share of it."
    kinds = {"earlier batches": "with statistics of earlier batches", "each batch": "with those of each batch"}
    best = {words: name for kind, words in kinds.items() if (name := _best(found, kind)) is not None}
    most = "; ".join(f"{words} {LABELS[name]} {kept(found.shares[name])}" for words, name in best.items())
    return f"{said}{times(gain)} fewer." + (f" Other arms keep at best, {most}." if most else "")


def _faster(found: StartSummary) -> str:
    faster = [name for name, ratio in found.than_reference.items() if ratio.low > 1]
    words = f"Clearly fewer steps than batch norm: {_list(faster) or 'no arm'}"
    if any(ratio.low != ratio.low for ratio in found.than_reference.values()):
        words = "One seed cannot say which arm needs clearly fewer steps than batch norm"
    missing = [name for name in ARMS if name not in (BASELINE, REFERENCE) and name not in found.than_reference]
    return f"{words}; did not get there in every run: {_list(missing) or 'none'}."


def seconds(start: str, found: StartSummary) -> str:
    """The arm that is fastest by the clock."""
    target = found.target
    if target is None:
        return f"From {STARTS[start]} there is no accuracy at which seconds could be compared."
    needed = {
        name: steps * result.seconds_per_step
        for name, result in found.results.items()
        if result.seconds_per_step is not None and (steps := _steps(result, target)) is not None
    }
    if BASELINE not in needed or REFERENCE not in needed:
        return "Seconds were not recorded."
    first = min(needed, key=lambda name: needed[name])
    others = {BASELINE: "the plain network", REFERENCE: "batch norm"}
    rest = " and ".join(f"{words} {needed[name]:.2g}" for name, words in others.items() if name != first)
    return (
        f"From {STARTS[start]} {LABELS[first]} is first at {100 * target:g} % by the clock, after "
        f"{needed[first]:.2g} seconds of one core, against {rest}."
    )


def ends(settings: FactorizationSettings, start: str, found: StartSummary) -> str:
    """Where training ends."""
    first = max(found.results, key=lambda name: found.results[name].accuracy.mean)
    accuracy = {name: percent(found.results[name].accuracy) for name in (first, BASELINE, REFERENCE)}
    return (
        f"After {settings.steps:,} steps from {STARTS[start]} the plain network recognizes {accuracy[BASELINE]} of the "
        f"test images, batch norm {accuracy[REFERENCE]}; the most recognizes {LABELS[first]}, {accuracy[first]}."
    )


def answer(settings: FactorizationSettings, summary: Summary) -> list[str]:
    """The sentences that open the report: what weights alone keep, and batch norm's gain from each start."""
    sentences = [_weights_alone(summary)]
    for start, found in summary.starts.items():
        if found.target is None:
            targets = ", ".join(f"{100 * accuracy:g} %" for accuracy in settings.targets)
            sentences.append(
                f"From {STARTS[start]} no accuracy of {targets} was reached by every run of the plain network and of "
                "batch norm."
            )
        else:
            sentences.append(f"{_gain(start, found)} {_faster(found)}")
    return sentences


def search_note(settings: FactorizationSettings, summary: Summary) -> str:
    """Where the search for rates has no end on one side."""
    if len(settings.rates) == 1:
        return "Only one rate was tried for each arm."
    ends = {"largest": [], "smallest": []}  # type: dict[str, list[str]]
    for start in settings.starts:
        for name in ARMS:
            full = full_name(name, start)
            rates = settings.rates_of(full)
            for word, rate in (("largest", max(rates)), ("smallest", min(rates))):
                if summary.chosen[full] == rate:
                    ends[word].append(f"{LABELS[name]} from {STARTS[start]}")
    said = [
        f"{'; '.join(found)}: the best rate is the {word} tried, so a better one may lie beyond."
        for word, found in ends.items()
        if found
    ]
    return " ".join(said) or "For every arm the best rate lies between others that did worse."
