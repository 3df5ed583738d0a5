"""Estimates in words, as reports and READMEs quote them."""

from __future__ import annotations

import math

from batchlab.lab.comparison import Estimate

__all__ = ["difference", "percent", "points", "times"]


def percent(value: Estimate) -> str:
    """A share as per cent, with its interval: 1.12 % (1.04 to 1.20)."""
    text = f"{100 * value.mean:.2f} %"
    return text if math.isnan(value.low) else f"{text} ({100 * value.low:.2f} to {100 * value.high:.2f})"


def points(value: Estimate) -> str:
    """A difference of shares in percentage points, with its interval: +0.21 (+0.10 to +0.32)."""
    text = f"{100 * value.mean:+.2f}"
    return text if math.isnan(value.low) else f"{text} ({100 * value.low:+.2f} to {100 * value.high:+.2f})"


def times(value: Estimate) -> str:
    """A ratio with its interval: 3.1 times (2.9 to 3.3)."""
    text = f"{value.mean:.1f} times"
    return text if math.isnan(value.low) else f"{text} ({value.low:.1f} to {value.high:.1f})"


def difference(value: Estimate) -> str:
    """A paired difference of test errors in words."""
    size = f"{abs(100 * value.mean):.2f} percentage points"
    if math.isnan(value.low):
        return f"{size} {'more' if value.mean > 0 else 'fewer'} (one seed, so without an interval)"
    if value.low <= 0 <= value.high:
        interval = f"95 % interval {100 * value.low:+.2f} to {100 * value.high:+.2f}"
        return f"no clear difference ({100 * value.mean:+.2f} percentage points, {interval})"
    low, high = sorted((abs(value.low), abs(value.high)))
    return (
        f"{size} {'more' if value.mean > 0 else 'fewer'} (95 % interval {100 * low:.2f} to {100 * high:.2f}, "
        f"{value.n} seeds)"
    )
