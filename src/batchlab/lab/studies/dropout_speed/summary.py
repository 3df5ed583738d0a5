"""The numbers of the study dropout-speed, from its points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from batchlab.lab.dropout_timing import epoch_seconds, step_flops
from batchlab.lab.studies.dropout_speed.measure import ARMS, Point, network
from batchlab.lab.studies.dropout_speed.settings import DropoutSpeedSettings
from batchlab.lab.timing import Quartiles, quartiles, ratio

__all__ = ["PAPER", "Row", "paper_row", "saving", "summarize", "to_json"]

PAPER: Final = {"width": 500, "batch_size": 100, "none": 0.33, "independent": 0.42, "bound": 0.75}
"""Graham et al. 2015, section 2 and Figure 1, as recalled: shares of the time that batchwise dropout saves."""


@dataclass(frozen=True)
class Row:
    """One width and batch size.

    Args:
        width: units of each hidden layer.
        batch_size: images in a step.
        epoch: arm -> seconds of an epoch, extrapolated from steps.
        times_faster: "none" and "independent" -> that arm's time over batchwise dropout's, round by round.
        over_limit: batchwise dropout's time over the small network's.
        work: operations of the small network over those of the whole one.
    """

    width: int
    batch_size: int
    epoch: dict[str, Quartiles]
    times_faster: dict[str, Quartiles]
    over_limit: Quartiles
    work: float


def saving(times_faster: Quartiles) -> Quartiles:
    """The share of the time that is saved.

    >>> saving(Quartiles(1.6, 2.0, 4.0))
    Quartiles(low=0.375, median=0.5, high=0.75)
    """
    return Quartiles(1 - 1 / times_faster.low, 1 - 1 / times_faster.median, 1 - 1 / times_faster.high)


def summarize(settings: DropoutSpeedSettings, points: Sequence[Point]) -> list[Row]:
    """A row for each point, by batch size and width."""
    rows = []
    for point in sorted(points, key=lambda point: (point.batch_size, point.width)):
        whole, ours = network(settings, point.width), point.seconds["batchwise"]
        seconds = {
            arm: [epoch_seconds(value, settings.epoch_images, point.batch_size) for value in point.seconds[arm]]
            for arm in ARMS
        }
        rows.append(
            Row(
                point.width,
                point.batch_size,
                {arm: quartiles(values) for arm, values in seconds.items()},
                {arm: ratio(point.seconds[arm], ours) for arm in ("none", "independent")},
                ratio(ours, point.seconds["small"]),
                step_flops(whole.small(), point.batch_size) / step_flops(whole, point.batch_size),
            )
        )
    return rows


def paper_row(rows: Sequence[Row]) -> Row | None:
    """The row that the paper gives numbers for, if it was measured."""
    wanted = (PAPER["width"], PAPER["batch_size"])
    return next((row for row in rows if (row.width, row.batch_size) == wanted), None)


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Plain values, rounded to what can be known."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {"points": [plain(asdict(row)) for row in rows]}
