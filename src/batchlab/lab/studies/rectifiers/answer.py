"""The study rectifiers in sentences: whatever the numbers say, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from batchlab.lab.comparison import Estimate, estimate
from batchlab.lab.studies.rectifiers.settings import NORMALIZATIONS, STARTS, RectifiersSettings, cell
from batchlab.lab.studies.rectifiers.summary import (
    CellResult,
    Summary,
    count_trained,
    fewer_steps,
    gain,
    trains,
)
from batchlab.lab.studies.sentences import percent

__all__ = [
    "accuracy_text",
    "answer",
    "closing",
    "in_words",
    "label",
    "listed",
    "slope_difference",
    "steps_text",
    "sure",
    "verdicts",
]


def listed(words: Sequence[object]) -> str:
    """Words in a row: 3, 10 and 22.

    >>> listed([3, 10, 22])
    '3, 10 and 22'
    """
    texts = [str(word) for word in words]
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def label(name: str) -> str:
    """What a network is called: 30 layers of ReLU, He's start, with batch norm."""
    start, depth, normalization = name.rsplit("-", 2)
    return f"{STARTS[start].label}, {depth} layers, {NORMALIZATIONS[normalization]}"


def sure(value: Estimate) -> str:
    """A difference of accuracies, and whether it is clear."""
    size = f"{100 * value.mean:+.2f} percentage points"
    if math.isnan(value.low):
        return f"{size}; one seed, so without an interval"
    interval = f"95 % interval {100 * value.low:+.2f} to {100 * value.high:+.2f}"
    return f"no clear difference: {size}, {interval}" if value.low <= 0 <= value.high else f"{size}, {interval}"


def in_words(gains: Mapping[int, Estimate]) -> str:
    """Differences of accuracy by number of hidden layers: where they are clear, and where not."""
    if any(math.isnan(value.low) for value in gains.values()):
        found = listed([f"{100 * value.mean:+.2f} with {depth}" for depth, value in gains.items()])
        return f"{found} hidden layers (percentage points; one seed, so without intervals)"
    kinds: dict[str, list[int]] = {"clearly more": [], "clearly less": [], "no clear difference": []}
    for depth, value in gains.items():
        clear = "clearly more" if value.mean > 0 else "clearly less"
        kinds["no clear difference" if value.low <= 0 <= value.high else clear].append(depth)
    parts = []
    for kind, depths in kinds.items():
        sizes = listed([f"{100 * gains[depth].mean:+.2f}" for depth in depths])
        if depths:
            parts.append(f"{kind} with {listed(depths)} hidden layers ({sizes} percentage points)")
    return ", ".join(parts)


def _gains(settings: RectifiersSettings, summary: Summary, other: str, base: str, norm: str) -> dict[int, Estimate]:
    return {d: gain(summary, cell(other, d, norm), cell(base, d, norm)) for d in settings.depths}


def _diverged(result: CellResult) -> str:
    return f", {result.diverged} diverged" if result.diverged else ""


def accuracy_text(result: CellResult) -> str:
    """Test accuracy; where not every run trains, how many do: the mean of two kinds of runs has no useful interval."""
    if trains(result):
        return percent(result.accuracy)
    return f"{100 * result.accuracy.mean:.2f} % ({result.trained} of {len(result.accuracies)} runs train)"


def _best(settings: RectifiersSettings, summary: Summary) -> str:
    deepest = settings.depths[-1]
    found = {}
    for norm in NORMALIZATIONS:
        names = [cell(start, deepest, norm) for start in STARTS]
        found[norm] = max(names, key=lambda name: summary.cells[name].accuracy.mean)
    texts = {
        norm: f"{STARTS[name.split('-')[0]].label} with {accuracy_text(summary.cells[name])}"
        for norm, name in found.items()
    }
    return (
        f"With {deepest} hidden layers the best without batch norm is {texts['none']}, the best with it "
        f"{texts['batch_norm']} ({sure(gain(summary, found['batch_norm'], found['none']))})."
    )


def answer(settings: RectifiersSettings, summary: Summary) -> list[str]:
    """The sentences that open the report: which networks train; the start; the rectifier."""
    plain, of = count_trained(settings, summary, "none")
    normalized, _ = count_trained(settings, summary, "batch_norm")
    deepest = settings.depths[-1]
    sentences = [
        f"Of {of} networks without batch norm {plain} train in every run: after {settings.steps:,} steps they "
        f"recognize {100 * settings.trains_from:g} % of the test images or more. With batch norm {normalized} of the "
        f"same {of} do."
    ]
    sentences.append(_best(settings, summary))
    start = []
    for norm, words in NORMALIZATIONS.items():
        he, xavier = (accuracy_text(summary.cells[cell(name, deepest, norm)]) for name in ("relu_he", "relu_xavier"))
        between = sure(gain(summary, cell("relu_he", deepest, norm), cell("relu_xavier", deepest, norm)))
        start.append(f"{words} {he} against {xavier} ({between})")
    sentences.append(f"ReLU, {deepest} hidden layers, He's start against Xavier's: {'; '.join(start)}.")
    rectifier = [
        f"{words} {in_words(_gains(settings, summary, 'prelu_he', 'relu_he', norm))}"
        for norm, words in NORMALIZATIONS.items()
    ]
    sentences.append(f"PReLU instead of ReLU, both from He's start: {'; '.join(rectifier)}.")
    return sentences


def steps_text(result: CellResult) -> str:
    """Mean steps to the target, over the runs that reached it."""
    got = [n for n in result.steps if n is not None]
    if not got:
        return "never"
    text = f"{float(f'{fmean(got):.3g}'):,.0f}"
    return text if len(got) == len(result.steps) else f"{text} ({len(got)} of {len(result.steps)} runs)"


def slope_difference(result: CellResult) -> Estimate | None:
    """The first layer's learned slope less the mean of the deeper layers'; None where no run has both."""
    found = [slopes[0] - fmean(slopes[1:]) for slopes in result.slopes if len(slopes) > 1]
    return estimate(found) if found else None


def _slopes(result: CellResult) -> str:
    found = slope_difference(result)
    if found is None:
        return "no run has slopes to compare"
    first, deeper = (fmean(part) for part in zip(*((s[0], fmean(s[1:])) for s in result.slopes), strict=True))
    size = f"{found.mean:+.3f}"
    if not math.isnan(found.low):
        size += f", {found.low:+.3f} to {found.high:+.3f}"
    kind = "one seed" if math.isnan(found.low) else "no clear difference" if found.low <= 0 <= found.high else "clear"
    return f"{first:.3f} in the first, {deeper:.3f} in the deeper ones ({size}: {kind})"


def _both(settings: RectifiersSettings, summary: Summary, depth: int) -> str:
    he, xavier = (cell(name, depth) for name in ("relu_he", "relu_xavier"))
    parts = [
        f"{name} start: {accuracy_text(summary.cells[key])}{_diverged(summary.cells[key])}"
        for name, key in (("He's", he), ("Xavier's", xavier))
    ]
    ratio = fewer_steps(summary, he, xavier)
    if ratio is not None:
        interval = "" if math.isnan(ratio.low) else f" ({ratio.low:.2f} to {ratio.high:.2f})"
        parts.append(
            f"He's takes {steps_text(summary.cells[he])} steps to {100 * settings.target:g} %, Xavier's "
            f"{steps_text(summary.cells[xavier])}, {ratio.mean:.2f}{interval} times as many"
        )
    return f"{depth} hidden layers. {'; '.join(parts)}"


def verdicts(settings: RectifiersSettings, summary: Summary) -> list[list[str]]:
    """What the paper says, and what was found: rows of a table."""
    depths, deepest = settings.depths, settings.depths[-1]
    rows = [["30 layers of ReLU: He's start converges, Xavier's stalls", _both(settings, summary, deepest)]]
    if len(depths) > 1:
        rows.append(["22 layers of ReLU: both converge, He's earlier", _both(settings, summary, depths[-2])])
        fewer = min(depths[:-1], key=lambda depth: abs(depth - deepest * 14 / 30))
        loss = gain(summary, cell("relu_he", deepest), cell("relu_he", fewer))
        rows.append(
            [
                "30 layers end with more errors than 14, He's start",
                f"{deepest} hidden layers against {fewer}, accuracy: {sure(loss)}",
            ]
        )
    rows.append(
        [
            "PReLU makes fewer errors than ReLU (1.2 percentage points with 14 layers on ImageNet)",
            f"accuracy without batch norm: {in_words(_gains(settings, summary, 'prelu_he', 'relu_he', 'none'))}",
        ]
    )
    rows += [
        [
            "the first layer learns a larger slope than deeper ones",
            f"{depth} hidden layers: {_slopes(summary.cells[cell('prelu_he', depth)])}",
        ]
        for depth in (depths if len(depths) < 3 else (depths[0], depths[-1]))
    ]
    trained = {depth: trains(summary.cells[cell("sigmoid", depth, "batch_norm")]) for depth in depths}
    parts = [
        f"{kind} with {listed([depth for depth, trains_there in trained.items() if trains_there is wanted])}"
        for kind, wanted in (("train", True), ("do not train in every run", False))
        if wanted in trained.values()
    ]
    return [
        *rows,
        [
            "(not in the paper) with batch norm, ReLU: He's start against Xavier's",
            f"accuracy: {in_words(_gains(settings, summary, 'relu_he', 'relu_xavier', 'batch_norm'))}",
        ],
        [
            "(not in the paper) with batch norm, PReLU against ReLU",
            f"accuracy: {in_words(_gains(settings, summary, 'prelu_he', 'relu_he', 'batch_norm'))}",
        ],
        ["(not in the paper) sigmoids with batch norm", f"{', '.join(parts)} hidden layers"],
    ]


def closing(summary: Summary) -> str:
    """Whether the best rates lie inside the rates tried."""
    if not summary.not_closed:
        return "No network that trains has its best rate at the edge of those tried."
    names = "; ".join(f"{label(name)} ({summary.chosen[name]:g})" for name in summary.not_closed)
    return f"At the edge of the rates tried, so perhaps with a better one beyond: {names}."
