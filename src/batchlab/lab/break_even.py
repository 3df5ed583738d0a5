"""From which p on does batchwise dropout on submatrices pay? Measured for a width, and said in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Final

from batchlab.lab.dropout_timing import TrainingStep, mlp, random_batches
from batchlab.lab.timing import Quartiles, calls_for, quartiles, ratio, take_turns
from batchlab.nn import BatchwiseDropout
from batchlab.nn.break_even import faster_mode

__all__ = ["LABELS", "DropoutTimes", "break_even", "break_evens", "measure", "reading"]

LABELS: Final = {"independent": "nn.Dropout", "mask": "masks", "batchwise": "submatrices"}
TURN: Final = 0.005
"""Seconds of a candidate's turn; the clock and a change of candidates cost nothing against it."""


@dataclass(frozen=True)
class DropoutTimes:
    """A training step of 784-width-width-10 with dropout of hidden units, three ways.

    Args:
        width: units of both hidden layers.
        rate: share of them that is dropped.
        seconds: of a step of "independent" (nn.Dropout and torch's SGD), "mask" and "batchwise" (on submatrices).
        gain: how many times as fast as nn.Dropout "mask" and "batchwise" are, round by round.
        chosen: what mode="auto" takes, "mask" or "batchwise".
    """

    width: int
    rate: float
    seconds: dict[str, Quartiles]
    gain: dict[str, Quartiles]
    chosen: str

    @property
    def fastest(self) -> str:
        """Which of the three, by their medians."""
        return min(self.seconds, key=lambda kind: self.seconds[kind].median)


def measure(
    width: int,
    rates: Sequence[float],
    batch_size: int,
    seconds: float = 0.7,
    on_progress: Callable[[float], None] = lambda _: None,
) -> list[DropoutTimes]:
    """Time the three at each rate.

    Args:
        width: units of both hidden layers.
        rates: shares p to drop.
        batch_size: samples in a step.
        seconds: that a rate takes, about; large networks take longer.
        on_progress: called again and again with the share of a rate's work that is newly done.
    """
    network = mlp((width, width), input_rate=0.0, rate=rates[0])
    images, labels = random_batches(network, batch_size)
    steps = {kind: TrainingStep(network, kind, images, labels, batch_size) for kind in LABELS}
    found = []
    for rate in rates:
        for step in steps.values():
            step.set_rates(rate)
        chain = steps["batchwise"].model
        dropouts = [module for module in chain if isinstance(module, BatchwiseDropout) and module.active]
        mode = faster_mode(chain, dropouts, images, {})
        calls, one_round = calls_for(steps, TURN)
        rounds = min(41, max(5, round(seconds / one_round)))
        times = take_turns(steps, rounds, calls=calls, warm_up=0, on_round=partial(on_progress, 1 / rounds))
        spread = {kind: quartiles(values) for kind, values in times.items()}
        gain = {kind: ratio(times["independent"], times[kind]) for kind in ("mask", "batchwise")}
        found.append(DropoutTimes(width, rate, spread, gain, "batchwise" if mode == "submatrix" else mode))
    return found


def break_even(times: Sequence[DropoutTimes]) -> float:
    """The p from which on submatrices are faster than nn.Dropout, at one width.

    Between two rates the ratio of times is taken to change evenly on a logarithmic scale. At or below the smallest
    rate: 0; above the largest: infinity.
    """
    ordered = sorted(times, key=lambda found: found.rate)
    logs = [math.log(found.gain["batchwise"].median) for found in ordered]
    if logs[-1] <= 0:
        return math.inf
    for (first, second), (low, high) in reversed(list(zip(pairwise(ordered), pairwise(logs), strict=True))):
        if low <= 0:
            return first.rate + (second.rate - first.rate) * -low / (high - low)
    return 0.0


def _from(rates: Sequence[float], p: float) -> str:
    if p == 0:
        return f"p {rates[0]:g} or less"
    return f"never up to p {rates[-1]:g}" if math.isinf(p) else f"p {p:.2f}"


def break_evens(times: Sequence[DropoutTimes]) -> dict[int, str]:
    """In words, for each width, from which p on submatrices are faster than nn.Dropout."""
    rates = sorted({found.rate for found in times})
    widths = sorted({found.width for found in times})
    return {width: _from(rates, break_even([t for t in times if t.width == width])) for width in widths}


def reading(times: Sequence[DropoutTimes]) -> str:
    """The table in one sentence."""
    widths = sorted({found.width for found in times})
    paying = [w for w in widths if math.isfinite(break_even([t for t in times if t.width == w]))]
    best = max(times, key=lambda found: found.gain["batchwise"].median)
    gain = best.gain["batchwise"].median
    where = f"width {best.width}, p = {best.rate:g}"
    if not paying:
        return (
            f"On this machine submatrices are not faster than nn.Dropout at any of these widths (closest: {where}, "
            f'{1 / gain:.2g} times its time): leave mode="auto", which takes what is faster of masks and submatrices, '
            "or keep nn.Dropout."
        )
    some = "at every one of these widths" if paying == widths else "at width " + ", ".join(map(str, paying))
    slower = sum(found.gain[found.chosen].high < 1 for found in times)
    auto = "in no cell" if not slower else f"in {slower} of {len(times)} cells"
    return (
        f"On this machine submatrices are faster than nn.Dropout {some} from the p named above, at most "
        f'{gain:.2g} times ({where}); what mode="auto" takes is clearly slower than nn.Dropout {auto}.'
    )
