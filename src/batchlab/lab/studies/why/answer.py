"""What the study why found, in sentences and beside what the papers say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from batchlab.lab.comparison import Estimate
from batchlab.lab.report import Table
from batchlab.lab.studies.arm_results import ArmResult
from batchlab.lab.studies.why.settings import NETWORKS, WhySettings, arm_of
from batchlab.lab.studies.why.summary import Measured, Summary

__all__ = ["answer", "compared", "number", "ratio_of", "ratio_text", "verdict_table"]


def number(value: float) -> str:
    """Two digits or more, without powers of ten where a reader expects none.

    >>> number(0.1234), number(1.0), number(123.4), number(0.00001234)
    ('0.12', '1.0', '123', '1.2e-05')
    """
    if not 1e-3 <= value < math.inf:
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
    if ratio is None:
        return "not measured"
    if math.isnan(ratio.low):
        return "one seed cannot tell"
    if not _is_clear(ratio):
        return "not clearly"
    return "no, it is larger" if ratio.mean > 1 else "yes"


def ratio_of(
    summary: Summary, network: str, normalization: str, measure: str, rates: str = "own", window: str = "same loss"
) -> Estimate | None:
    """A measure with this normalization over the same without; None where it cannot be told."""
    found: Measured | None = summary.parts[network][rates][window][normalization].get(measure)
    return None if found is None else found.ratio


def _in_networks(texts: Sequence[str]) -> str:
    return " and ".join(f"{text} in the {name}" for text, name in zip(texts, NETWORKS.values(), strict=True))


def _all(summary: Summary, normalization: str, measure: str, rates: str = "own", window: str = "same loss") -> str:
    texts = [compared(ratio_of(summary, network, normalization, measure, rates, window)) for network in NETWORKS]
    return _in_networks(texts)


def _fewer(result: ArmResult, target: float) -> Estimate | None:
    return next(row.ratio for row in result.steps if row.target == target)


def _steps(summary: Summary, network: str) -> str:
    target = summary.targets[network]
    if target is None:
        return f"no target was reached by every run of the {NETWORKS[network]}"
    counts = {}
    for normalization in ("none", "batch_norm", "noisy_batch_norm"):
        result = summary.results[network][arm_of(network, normalization)]
        got = next([n for n in row.other if n is not None] for row in result.steps if row.target == target)
        counts[normalization] = f"{float(f'{fmean(got):.3g}'):,.0f}"
    return (
        f"{100 * target:g} % of the test images are recognized by the {NETWORKS[network]} after {counts['none']} steps "
        f"without normalization, {counts['batch_norm']} with batch norm and {counts['noisy_batch_norm']} with noisy "
        "batch norm"
    )


def _faster_with_more_shift(summary: Summary) -> str:
    """Where noisy batch norm has clearly more shift than no normalization, and clearly fewer steps."""
    found = []
    for network, name in NETWORKS.items():
        target = summary.targets[network]
        shift = ratio_of(summary, network, "noisy_batch_norm", "relative_shift_anew")
        result = summary.results[network][arm_of(network, "noisy_batch_norm")]
        fewer = None if target is None else _fewer(result, target)
        if shift is None or fewer is None or not (_is_clear(shift) and _is_clear(fewer)):
            continue
        if shift.mean > 1 and fewer.mean > 1:
            found.append(f"the {name} ({ratio_text(fewer)} times fewer)")
    if found:
        return f"Clearly more shift than without normalization, and yet clearly fewer steps: {' and '.join(found)}."
    return "In neither network does noisy batch norm have clearly more shift and clearly fewer steps than none."


def answer(settings: WhySettings, summary: Summary) -> list[str]:
    """The sentences that open the report: the shift; noise; the landscape."""
    high, low = settings.losses
    shift = "batch_norm", "relative_shift"
    verdicts = [_verdict(ratio_of(summary, network, *shift)) for network in NETWORKS]
    learned = "; ".join(_steps(summary, network) for network in NETWORKS)
    return [
        "Does batch norm reduce internal covariate shift? By how much a layer's gradient changes, relative to itself, "
        f"when the layers in front of it take their next step: {_in_networks(verdicts)}. Compared with no "
        f"normalization this change is {_all(summary, *shift)}, each arm at its own best rate, while the training loss "
        f"is between {high:g} and {low:g}. In the first tenth of training it is "
        f"{_all(summary, *shift, window='early')}; in the second half {_all(summary, *shift, window='late')}. With all "
        f"arms at one rate, at that training loss, it is {_all(summary, *shift, rates='common')}.",
        "With noise behind batch norm whose distribution is drawn anew in each step, the change from one step to the "
        f"next, noise included, is {_all(summary, 'noisy_batch_norm', 'relative_shift_anew')}, compared with no "
        f"normalization. {learned[0].upper()}{learned[1:]}. {_faster_with_more_shift(summary)}",
        "What else batch norm changes is the way along the gradient. With all arms at one rate, at the same training "
        "loss, the largest change of the gradient between a half and four times the gradient step is "
        f"{_all(summary, 'batch_norm', 'change', 'common')}, and the effective β-smoothness "
        f"{_all(summary, 'batch_norm', 'smoothness', 'common')}; with noisy batch norm the β-smoothness is "
        f"{_all(summary, 'noisy_batch_norm', 'smoothness', 'common')}.",
    ]


def _cell(summary: Summary, normalization: str, measure: str, rates: str = "own") -> str:
    texts = [
        f"{name}: {compared(ratio_of(summary, network, normalization, measure, rates))}"
        for network, name in NETWORKS.items()
    ]
    return "; ".join(texts)


def _noisy_steps(summary: Summary) -> str:
    texts = []
    for network, name in NETWORKS.items():
        target = summary.targets[network]
        if target is None:
            texts.append(f"{name}: no target was reached by every run")
            continue
        fewer = _fewer(summary.results[network][arm_of(network, "noisy_batch_norm")], target)
        if fewer is None:
            sure = "not measured"
        elif math.isnan(fewer.low):
            sure = "one seed, so without an interval"
        else:
            sure = "not clear" if not _is_clear(fewer) else ("faster" if fewer.mean > 1 else "slower")
        texts.append(f"{name}: {ratio_text(fewer)} times fewer steps to {100 * target:g} % ({sure})")
    return "; ".join(texts)


def verdict_table(summary: Summary, caption: str) -> Table:
    """What Santurkar et al. say, and what was found, with batch norm over without at the same training loss."""
    rows = [
        [
            "gradients shift as much with batch norm as without, or more",
            f"relative to the gradient, own rates: {_cell(summary, 'batch_norm', 'relative_shift')}",
        ],
        ["... not divided by the gradient", _cell(summary, "batch_norm", "shift")],
        ["... as a turn of the gradient, 1 - cos(G, G')", _cell(summary, "batch_norm", "turn")],
        [
            "(Ioffe & Szegedy) the distribution of what layers get shifts less",
            f"means of a layer's inputs: {_cell(summary, 'batch_norm', 'moved')}",
        ],
        ["noise after batch norm shifts what layers get", _cell(summary, "noisy_batch_norm", "moved_anew")],
        ["... and training is still faster than without normalization", _noisy_steps(summary)],
        [
            "the loss varies less along the gradient",
            f"common rate: {_cell(summary, 'batch_norm', 'loss_range', 'common')}",
        ],
        ["gradients are more predictive", f"common rate: {_cell(summary, 'batch_norm', 'change', 'common')}"],
        ["the loss is smoother (effective β)", f"common rate: {_cell(summary, 'batch_norm', 'smoothness', 'common')}"],
    ]
    return Table(["the paper", "here, batch norm compared with none"], rows, caption)
