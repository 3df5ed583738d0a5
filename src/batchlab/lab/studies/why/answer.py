"""What the study why found, in sentences and beside what the papers say."""

from __future__ import annotations

import math
from statistics import fmean

from batchlab.lab.comparison import Estimate
from batchlab.lab.report import Table
from batchlab.lab.studies.why.settings import NETWORKS, NORMALIZATIONS, WhySettings, arm_of
from batchlab.lab.studies.why.summary import Measured, Summary

__all__ = ["answer", "compared", "number", "ratio_of", "ratio_text", "verdict_table"]


def number(value: float) -> str:
    """Two digits or more, without powers of ten where a reader expects none.

    >>> number(0.1234), number(1.0), number(123.4), number(0.00001234)
    ('0.12', '1.0', '123', '1.2e-05')
    """
    if not 1e-4 <= value < math.inf:
        return f"{value:.2g}"
    return f"{value:,.{max(0, 1 - math.floor(math.log10(value)))}f}"


def ratio_text(ratio: Estimate | None) -> str:
    """How many times as much as without normalization, with its interval."""
    if ratio is None:
        return "–"
    text = number(ratio.mean)
    return text if math.isnan(ratio.low) else f"{text} ({number(ratio.low)} to {number(ratio.high)})"


def _is_clear(ratio: Estimate | None) -> bool:
    return ratio is not None and not math.isnan(ratio.low) and not ratio.low <= 1 <= ratio.high


def compared(ratio: Estimate | None) -> str:
    """A ratio to no normalization in words."""
    if ratio is None:
        return "not measured"
    if math.isnan(ratio.low):
        return f"{number(ratio.mean)} times (one seed, so without an interval)"
    interval = f"{number(ratio.mean)} times, {number(ratio.low)} to {number(ratio.high)}"
    if not _is_clear(ratio):
        return f"not clearly different ({interval})"
    return f"{'larger' if ratio.mean > 1 else 'smaller'} ({interval})"


def _verdict(ratio: Estimate | None) -> str:
    """Whether a ratio says that batch norm makes something smaller, and how sure that is."""
    if ratio is None:
        return "not measured"
    size = f"{ratio_text(ratio)} times as much as without normalization"
    if math.isnan(ratio.low):
        return f"one seed cannot tell, {size}"
    if not _is_clear(ratio):
        return f"no clear difference, {size}"
    return f"{'no' if ratio.mean > 1 else 'yes'}, {size}"


def ratio_of(
    summary: Summary, network: str, normalization: str, measure: str, rates: str = "own", window: str = "same loss"
) -> Estimate | None:
    """A measure with this normalization over the same without; None where it cannot be told."""
    found: Measured | None = summary.parts[network][rates][window][normalization].get(measure)
    return None if found is None else found.ratio


def _all(summary: Summary, normalization: str, measure: str, rates: str = "own", window: str = "same loss") -> str:
    """A measure compared with no normalization, in each network."""
    texts = [
        f"{name} {compared(ratio_of(summary, network, normalization, measure, rates, window))}"
        for network, name in NETWORKS.items()
    ]
    return "; ".join(texts)


def _fewer(summary: Summary, network: str) -> dict[float, Estimate]:
    """Target -> how many times fewer steps noisy batch norm takes than none, where every run of both got there."""
    rows = summary.results[network][arm_of(network, "noisy_batch_norm")].steps
    return {row.target: row.ratio for row in rows if row.target and row.ratio and None not in row.baseline + row.other}


def _steps(summary: Summary, network: str) -> str:
    target = summary.targets[network]
    if target is None:
        return f"{NETWORKS[network]}, none that every run reached"
    counts = []
    for normalization, label in NORMALIZATIONS.items():
        result = summary.results[network][arm_of(network, normalization)]
        got = next([n for n in row.other if n is not None] for row in result.steps if row.target == target)
        counts.append(f"{float(f'{fmean(got):.3g}'):,.0f} ({label})")
    return f"{NETWORKS[network]}, {100 * target:g} %, after {', '.join(counts)}"


def _faster_with_more_shift(summary: Summary) -> str:
    """Where noisy batch norm has clearly more shift than no normalization, and clearly fewer steps."""
    found = []
    for network, name in NETWORKS.items():
        shift = ratio_of(summary, network, "noisy_batch_norm", "relative_shift_anew")
        if shift is None or not _is_clear(shift) or shift.mean < 1:
            continue
        faster = {target: ratio for target, ratio in _fewer(summary, network).items() if _is_clear(ratio)}
        texts = [
            f"{ratio_text(ratio)} times fewer to {100 * target:g} %"
            for target, ratio in faster.items()
            if ratio.mean > 1
        ]
        if texts:
            found.append(f"{name}, {', '.join(texts)}")
    if found:
        return f"Clearly more shift than without normalization, and yet clearly fewer steps: {'; '.join(found)}."
    return "In neither network does noisy batch norm have clearly more shift and clearly fewer steps than none."


def answer(settings: WhySettings, summary: Summary) -> list[str]:
    """The sentences that open the report: the shift; noise; the landscape."""
    high, low = settings.losses
    shift = "batch_norm", "relative_shift"
    verdicts = [f"In the {name}: {_verdict(ratio_of(summary, network, *shift))}." for network, name in NETWORKS.items()]
    return [
        f"Does batch norm reduce internal covariate shift? {' '.join(verdicts)} Measured is how much the next step of "
        "the layers in front changes a layer's gradient, relative to the gradient, while the training loss is between "
        f"{high:g} and {low:g}, each arm at its own best rate.",
        f"In the first hundredth of training: {_all(summary, *shift, window='start')}. In the first tenth: "
        f"{_all(summary, *shift, window='early')}. In the second half: {_all(summary, *shift, window='late')}.",
        "With noise behind batch norm that is drawn anew in each step and counts as shift, compared with no "
        f"normalization: {_all(summary, 'noisy_batch_norm', 'relative_shift_anew')}. Steps to a test accuracy: "
        f"{'; '.join(_steps(summary, network) for network in NETWORKS)}. {_faster_with_more_shift(summary)}",
        "What a step meets on its way, all arms at one rate, at the same training loss. Largest change of the gradient "
        "from a half to four times the gradient step, with batch norm: "
        f"{_all(summary, 'batch_norm', 'change', 'common')}. Range of the loss over these steps: "
        f"{_all(summary, 'batch_norm', 'loss_range', 'common')}. Effective β-smoothness: "
        f"{_all(summary, 'batch_norm', 'smoothness', 'common')}; with noisy batch norm: "
        f"{_all(summary, 'noisy_batch_norm', 'smoothness', 'common')}.",
    ]


def _noisy_steps(summary: Summary) -> str:
    texts = []
    for network, name in NETWORKS.items():
        words = []
        for target, fewer in _fewer(summary, network).items():
            if math.isnan(fewer.low):
                sure = "one seed, so without an interval"
            else:
                sure = "not clear" if not _is_clear(fewer) else ("faster" if fewer.mean > 1 else "slower")
            words.append(f"{ratio_text(fewer)} times fewer steps to {100 * target:g} % ({sure})")
        texts.append(f"{name} {', '.join(words) or 'has no target that every run reached'}")
    return "; ".join(texts)


def verdict_table(summary: Summary, caption: str) -> Table:
    """What Santurkar et al. say, and what was found, with batch norm over without at the same training loss."""
    rows = [
        [
            "gradients shift as much with batch norm as without, or more",
            f"relative to the gradient, own rates: {_all(summary, 'batch_norm', 'relative_shift')}",
        ],
        ["... all arms at one rate", _all(summary, "batch_norm", "relative_shift", "common")],
        ["... not divided by the gradient", _all(summary, "batch_norm", "shift")],
        ["... as a turn of the gradient, 1 - cos(G, G')", _all(summary, "batch_norm", "turn")],
        [
            "(Ioffe & Szegedy) the distribution of what layers get shifts less",
            f"means of a layer's inputs: {_all(summary, 'batch_norm', 'moved')}",
        ],
        ["noise after batch norm shifts what layers get", _all(summary, "noisy_batch_norm", "moved_anew")],
        ["... and training is still faster than without normalization", _noisy_steps(summary)],
        [
            "the loss varies less along the gradient",
            f"common rate: {_all(summary, 'batch_norm', 'loss_range', 'common')}",
        ],
        ["gradients are more predictive", f"common rate: {_all(summary, 'batch_norm', 'change', 'common')}"],
        ["the loss is smoother (effective β)", f"common rate: {_all(summary, 'batch_norm', 'smoothness', 'common')}"],
    ]
    return Table(["the paper", "here, batch norm compared with none"], rows, caption)
