"""What the records of the study whitening say, as numbers and in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from batchlab.lab.comparison import Estimate, StepsToTarget, paired_ratio
from batchlab.lab.studies.arm_results import ArmResult, arm_results, seconds_per_step
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.search import Scores
from batchlab.lab.studies.sentences import percent
from batchlab.lab.studies.whitening.settings import ARMS, WhiteningSettings

__all__ = ["Summary", "answer", "summarize", "verdicts"]


@dataclass(frozen=True)
class Summary:
    """All numbers of the study.

    Args:
        chosen: each arm's best rate.
        scores: of the search.
        results: each arm against no normalization.
        target: the hardest accuracy that every run of "none" and of batch norm reached; None if there is none.
        than_batch_norm: arm -> steps of batch norm divided by its own, to that target, paired by seed; only arms of
            which every run got there.
        seconds_than_batch_norm: the same of seconds of one core, each run at its own pace; empty if not recorded.
    """

    chosen: dict[str, float]
    scores: Scores
    results: dict[str, ArmResult]
    target: float | None
    than_batch_norm: dict[str, Estimate]
    seconds_than_batch_norm: dict[str, Estimate]


def _row(result: ArmResult, target: float) -> StepsToTarget:
    return next(row for row in result.steps if row.target == target)


def summarize(finished: Finished) -> Summary:
    """Compute the summary of a finished study from its records."""
    settings: WhiteningSettings = finished.settings
    results = arm_results(finished, "none", settings.targets)
    reached = [row.target or 0.0 for row in results["batch_norm"].steps if None not in (*row.baseline, *row.other)]
    target = max(reached, default=None)
    than: dict[str, Estimate] = {}
    if target is not None:
        base = [n for n in _row(results["batch_norm"], target).other if n]
        for name, result in results.items():
            own = [n for n in _row(result, target).other if n]
            if name != "batch_norm" and len(own) == len(base):
                than[name] = paired_ratio(base, own)
    paces = {name: seconds_per_step(finished.runs(name)) for name in results}
    seconds = {
        name: paired_ratio(_seconds(results["batch_norm"], paces["batch_norm"], target), mine)
        for name in than
        if paces["batch_norm"] and (mine := _seconds(results[name], paces[name], target))
    }
    return Summary(finished.chosen, finished.scores, results, target, than, seconds)


def _seconds(result: ArmResult, paces: Sequence[float], target: float | None) -> list[float]:
    """Seconds of each run to a target that all of them reached."""
    return [] if target is None else [n * pace for n, pace in zip(_row(result, target).other, paces, strict=False) if n]


def _steps(result: ArmResult, target: float) -> str:
    values = _row(result, target).other
    got = [n for n in values if n is not None]
    return f"{float(f'{fmean(got):.3g}'):,.0f}" if len(got) == len(values) else "not in every run"


def _is_clear(ratio: Estimate) -> bool:
    return ratio.low == ratio.low and not ratio.low <= 1 <= ratio.high


def _against_batch_norm(ratio: Estimate) -> str:
    interval = "" if ratio.low != ratio.low else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{ratio.mean:.2f}{interval}"


def _verdict(summary: Summary) -> str:
    """Which arms are clearly faster or slower than batch norm, in a sentence or two."""
    groups: dict[str, list[str]] = {"faster": [], "slower": [], "neither": []}
    for name, ratio in summary.than_batch_norm.items():
        kind = "neither" if not _is_clear(ratio) else "faster" if ratio.mean > 1 else "slower"
        shown = ratio if kind == "faster" else Estimate(1 / ratio.mean, 1 / ratio.high, 1 / ratio.low, ratio.n)
        words = "fewer" if kind == "faster" else "as many"
        text = "" if kind == "neither" else f" ({_against_batch_norm(shown)} times {words} steps)"
        groups[kind].append(f"{ARMS[name]}{text}")
    never = [ARMS[name] for name in summary.results if name not in (*summary.than_batch_norm, "batch_norm")]
    parts = [f"Clearly faster than batch norm: {'; '.join(groups['faster']) or 'nothing'}."]
    if groups["slower"]:
        parts.append(f"Clearly slower: {'; '.join(groups['slower'])}.")
    if groups["neither"]:
        parts.append(f"No clear difference: {'; '.join(groups['neither'])}.")
    if never:
        parts.append(f"Not there in every run: {'; '.join(never)}.")
    return " ".join(parts)


def answer(settings: WhiteningSettings, summary: Summary) -> list[str]:
    """The sentences that open the report: what is faster than batch norm; steps; where training ends."""
    results, target = summary.results, summary.target
    ends = (
        f"After {settings.steps:,} steps {percent(results['none'].accuracy)} of the test images are recognized without "
        f"normalization, {percent(results['batch_norm'].accuracy)} with batch norm and "
        f"{percent(results['whitening'].accuracy)} with all channels whitened."
    )
    if target is None:
        targets = ", ".join(f"{100 * accuracy:g} %" for accuracy in settings.targets)
        return [f"Of {targets} no accuracy was reached by every run without normalization and with batch norm.", ends]
    counts = "; ".join(f"{ARMS[name]}: {_steps(result, target)}" for name, result in results.items())
    return [
        f"Until {100 * target:g} % of the test images are recognized, each at its own best learning rate. "
        f"{_verdict(summary)}",
        f"Training steps. {counts}.",
        ends,
    ]


def verdicts(summary: Summary, seconds: bool = False) -> list[list[str]]:
    """Each part against batch norm, in steps or seconds, in words: rows of a table."""
    ratios = summary.seconds_than_batch_norm if seconds else summary.than_batch_norm
    rows = []
    for name in summary.results:
        if name == "batch_norm":
            continue
        ratio = ratios.get(name)
        if ratio is None:
            rows.append([ARMS[name], "did not reach it in every run"])
            continue
        if ratio.low != ratio.low:
            sure = "one seed, so without an interval"
        elif not _is_clear(ratio):
            sure = "no clear difference"
        else:
            sure = "clearly faster" if ratio.mean > 1 else "clearly slower"
        rows.append([ARMS[name], f"{_against_batch_norm(ratio)}: {sure}"])
    return rows
