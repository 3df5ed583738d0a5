"""The study dropout-speed in sentences: whatever the numbers say, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.lab.studies.dropout_speed.settings import DropoutSpeedSettings
from batchlab.lab.studies.dropout_speed.summary import PAPER, Row, paper_row, saving
from batchlab.lab.timing import Quartiles

__all__ = ["answer", "percent", "percent_range", "seconds_text", "times", "where"]


def percent(share: float) -> str:
    """A share as per cent: 33 %."""
    return f"{100 * share:.0f} %"


def percent_range(share: Quartiles) -> str:
    """A share with its quartiles: 33 % (31 to 35)."""
    return f"{percent(share.median)} ({100 * share.low:.0f} to {100 * share.high:.0f})"


def times(spread: Quartiles) -> str:
    """A ratio with its quartiles: 1.12 (1.10 to 1.15)."""
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def seconds_text(seconds: float) -> str:
    """Seconds with three significant digits: 1.23, 45.6, 1,230."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{float(f'{seconds:.3g}'):g}"


def where(row: Row) -> str:
    """A point in words."""
    return f"{row.width:,} units and batches of {row.batch_size:,}"


def _less(times_faster: Quartiles) -> str:
    share = saving(times_faster)
    if times_faster.low <= 1 <= times_faster.high:
        return (
            f"about as much time as (the quartiles of the ratio are {times_faster.low:.2f} and {times_faster.high:.2f})"
        )
    if share.median > 0:
        return f"{percent(share.median)} less time (quartiles {100 * share.low:.0f} to {100 * share.high:.0f}) than"
    more = [1 / value - 1 for value in (times_faster.high, times_faster.median, times_faster.low)]
    return f"{percent(more[1])} more time (quartiles {100 * more[0]:.0f} to {100 * more[2]:.0f}) than"


def _change(row: Row) -> str:
    share = saving(row.times_faster["none"]).median
    return f"{percent(abs(share))} {'less' if share >= 0 else 'more'} ({where(row)})"


def answer(settings: DropoutSpeedSettings, rows: Sequence[Row]) -> list[str]:
    """The two sentences that open the report: the paper's point, and the range over all points with the limit."""
    row = paper_row(rows)
    paper = (
        f" (the paper's figures, as recalled, for a graphics processor of 2013: {percent(PAPER['none'])} and "
        f"{percent(PAPER['independent'])})"
    )
    if row is None:
        row, paper = max(rows, key=lambda row: (-row.batch_size, row.width)), ""
    first = (
        f"With {settings.hidden_layers} hidden layers of {where(row)}, training with batchwise dropout takes "
        f"{_less(row.times_faster['none'])} training without dropout, and {_less(row.times_faster['independent'])} "
        f"training with independent dropout{paper}."
    )
    ordered = sorted(rows, key=lambda row: row.times_faster["none"].median)
    least, most = ordered[0], ordered[-1]
    span = _change(most) if len(rows) == 1 else f"from {_change(least)} to {_change(most)}"
    limits = sorted(row.over_limit.median for row in rows)
    between = f"{limits[0]:.2f}" if len(limits) == 1 else f"{limits[0]:.2f} to {limits[-1]:.2f}"
    second = (
        f"Against no dropout the change in time is {span}, where arithmetic alone would spare "
        f"{percent(1 - most.work)}; and it takes {between} times as long as a dense network of just the "
        "kept units, which is the limit."
    )
    return [first, second]
