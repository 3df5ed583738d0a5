"""The measures of the study why, out of the landscape that runs record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from batchlab.lab.records import RunRecord

__all__ = ["MEASURES", "WINDOWS", "geometric_mean", "layer_shifts", "of_line", "of_run", "window"]

MEASURES: Final[dict[str, str]] = {
    "relative_shift": "gradient shift ‖G - G'‖ / ‖G‖",
    "shift": "gradient shift ‖G - G'‖",
    "turn": "gradient turn 1 - cos(G, G')",
    "moved": "shift of the inputs' means, in standard deviations",
    "relative_shift_anew": "gradient shift ‖G - G'‖ / ‖G‖, next step's noise",
    "moved_anew": "shift of the inputs' means, next step's noise",
    "loss_range": "range of the loss along the gradient",
    "change": "change of the gradient along itself, largest",
    "relative_change": "the same, relative to the gradient",
    "smoothness": "effective β-smoothness",
}
"""Name -> what tables call it."""

WINDOWS: Final = ("start", "early", "late", "same loss")


def geometric_mean(values: Sequence[float]) -> float:
    """The mean on a logarithmic scale; NaN if there is nothing, or something that is not above 0.

    >>> geometric_mean([1.0, 100.0])
    10.0...
    """
    usable = bool(values) and all(0 < value < math.inf for value in values)
    return math.exp(fmean(math.log(value) for value in values)) if usable else math.nan


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [_number(value) for value in values]


Found = Mapping[str, Any]
"""What a run records of the landscape at one evaluation."""


def _shift(found: Found) -> Mapping[str, Any]:
    shift: Mapping[str, Any] = found["shift"]
    return shift


def _anew(found: Found) -> Mapping[str, Any]:
    """With the next step's random numbers; a network that draws none is the same with any."""
    anew: Mapping[str, Any] = found["shift"].get("anew", found["shift"])
    return anew


def _relative(found: Found, kind: Callable[[Found], Mapping[str, Any]]) -> list[float]:
    pairs = zip(_numbers(kind(found)["shift"]), _numbers(found["shift"]["gradient"]), strict=True)
    return [change / norm if norm else math.nan for change, norm in pairs]


def _largest_change(found: Found) -> float:
    changes = _numbers(found["along"]["changes"])
    return max(changes) if all(map(math.isfinite, changes)) else math.nan


def _loss_range(found: Found) -> float:
    losses = _numbers(found["along"]["losses"])
    return max(losses) - min(losses) if all(map(math.isfinite, losses)) else math.nan


_OF: Final[dict[str, Callable[[Found], float]]] = {
    "relative_shift": lambda found: geometric_mean(_relative(found, _shift)),
    "shift": lambda found: geometric_mean(_numbers(_shift(found)["shift"])),
    "turn": lambda found: 1 - fmean(_numbers(_shift(found)["cosine"])),
    "moved": lambda found: geometric_mean(_numbers(_shift(found)["moved"])),
    "relative_shift_anew": lambda found: geometric_mean(_relative(found, _anew)),
    "moved_anew": lambda found: geometric_mean(_numbers(_anew(found)["moved"])),
    "loss_range": _loss_range,
    "change": _largest_change,
    "relative_change": lambda found: _largest_change(found) / (_number(found["along"]["norm"]) or math.nan),
    "smoothness": lambda found: _number(found["along"]["smoothness"]),
}


def of_line(line: Mapping[str, Any], measure: str) -> float:
    """A measure at one evaluation, over layers the geometric mean (of cosines the plain one); NaN if there is none."""
    return _OF[measure](line["landscape"])


def layer_shifts(line: Mapping[str, Any]) -> list[float]:
    """The relative gradient shift of each layer but the first."""
    return _relative(line["landscape"], _shift)


def window(record: RunRecord, name: str, losses: tuple[float, float]) -> list[dict[str, Any]]:
    """The evaluations of a run that belong to a part of its training.

    "start": the first hundredth of the steps; "early": the first tenth; "late": the second half; "same loss": where
    the training loss, the mean since the last evaluation, is between the two `losses`. The untrained network belongs
    to none.
    """
    high, low = losses
    steps = record.settings.steps
    lines = [line for line in record.metrics if line["step"]]
    if name in ("start", "early"):
        return [line for line in lines if line["step"] <= steps / (100 if name == "start" else 10)]
    if name == "late":
        return [line for line in lines if line["step"] > steps / 2]
    return [line for line in lines if low <= line["train_loss"] <= high]


def of_run(lines: Sequence[Mapping[str, Any]], measure: str) -> float:
    """A measure over some evaluations of a run, the geometric mean of those where it is defined; else NaN."""
    values = [of_line(line, measure) for line in lines]
    return geometric_mean([value for value in values if 0 < value < math.inf])
