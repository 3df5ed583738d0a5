"""The study bn-mnist in sentences: whatever the numbers say, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping

from batchlab.lab.comparison import Estimate, StepsToTarget
from batchlab.lab.studies.bn_mnist.settings import BnMnistSettings
from batchlab.lab.studies.bn_mnist.summary import Comparison

__all__ = ["answer", "count", "ending", "mean_steps", "percent", "ratio_text", "speed", "target_name"]


def count(value: float) -> str:
    """A count with three significant digits: 1,180."""
    digits = max(0, math.floor(math.log10(value)) - 2) if value >= 1 else 0
    return f"{round(value, -digits):,.0f}"


def percent(value: Estimate, digits: int = 2) -> str:
    """A share as per cent, with its interval: 97.12 % (97.01 to 97.23)."""
    text = f"{100 * value.mean:.{digits}f} %"
    if math.isnan(value.low):
        return text
    return f"{text} ({100 * value.low:.{digits}f} to {100 * value.high:.{digits}f})"


def ratio_text(ratio: Estimate) -> str:
    """A ratio with its interval: 3.3 (3.0 to 3.6)."""
    if math.isnan(ratio.low):
        return f"{ratio.mean:.2g}" if ratio.mean < 10 else f"{ratio.mean:.0f}"
    return f"{ratio.mean:.1f} ({ratio.low:.1f} to {ratio.high:.1f})"


def mean_steps(values: tuple[int | None, ...]) -> float:
    """Mean over the runs that reached the target; NaN if none did."""
    reached = [value for value in values if value]
    return sum(reached) / len(reached) if reached else math.nan


def target_name(target: float | None) -> str:
    """A target accuracy in words; None is the baseline's best."""
    return "the best without" if target is None else f"{100 * target:g} %"


def _how_sure(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return "one seed, so without an interval"
    return f"95 % interval {estimate.low:.1f} to {estimate.high:.1f}, {estimate.n} seeds"


def _verdict(ratio: Estimate) -> str:
    if not math.isnan(ratio.low) and ratio.low <= 1 <= ratio.high:
        return f"a ratio of {ratio.mean:.1f}, which is no clear difference"
    return f"{ratio.mean:.1f} times fewer" if ratio.mean >= 1 else f"{1 / ratio.mean:.1f} times more"


def speed(settings: BnMnistSettings, row: StepsToTarget | None) -> str:
    """One sentence on the steps to a target."""
    if row is None or row.ratio is None:
        return (
            f"Within {settings.steps:,} steps not every run reached {target_name(settings.targets[0])} of the test "
            "images, so there is no fair number of steps to compare; the table below has what was reached."
        )
    ratio = row.ratio
    steps, baseline = count(mean_steps(row.other)), count(mean_steps(row.baseline))
    end = f"{_verdict(ratio)} ({_how_sure(ratio)}), each at the learning rate that suits it best."
    if row.target is None:
        return (
            f"With batch normalization the network needs {steps} training steps to become as good as it ever became "
            f"without, which took {baseline} of {settings.steps:,} steps: {end}"
        )
    return (
        f"With batch normalization the network needs {steps} training steps to recognize {target_name(row.target)} "
        f"of the test images; without, it needs {baseline}: {end}"
    )


def ending(settings: BnMnistSettings, comparison: Comparison) -> str:
    """One sentence, without its full stop, on the accuracy after the last step."""
    gain = comparison.gain
    points = f"{abs(100 * gain.mean):.2f} percentage points"
    if math.isnan(gain.low):
        verdict = f"{'ahead' if gain.mean > 0 else 'behind'} by {points} (one seed, so without an interval)"
    elif gain.low > 0:
        verdict = f"better by {points} (95 % interval {100 * gain.low:.2f} to {100 * gain.high:.2f})"
    elif gain.high < 0:
        verdict = f"worse by {points} (95 % interval {-100 * gain.high:.2f} to {-100 * gain.low:.2f})"
    else:
        interval = f"95 % interval {100 * gain.low:+.2f} to {100 * gain.high:+.2f}"
        verdict = f"no clear difference ({100 * gain.mean:+.2f} percentage points, {interval})"
    return (
        f"After {settings.steps:,} steps it is right on {100 * comparison.accuracy[1].mean:.2f} % of the test images, "
        f"against {100 * comparison.accuracy[0].mean:.2f} % without: {verdict}"
    )


def _from_a_better_start(control: Comparison | None) -> str:
    if control is None or control.headline is None or control.headline.ratio is None:
        return "."
    row, ratio = control.headline, control.headline.ratio
    return (
        f"; from well-scaled first weights it takes {count(mean_steps(row.other))} steps with and "
        f"{count(mean_steps(row.baseline))} without to {target_name(row.target)}: {_verdict(ratio)} "
        f"({_how_sure(ratio)})."
    )


def answer(settings: BnMnistSettings, comparisons: Mapping[str, Comparison]) -> list[str]:
    """The two sentences that open the report: how fast; where training ends, and what the control says."""
    own = comparisons["own"]
    last = ending(settings, own) + _from_a_better_start(comparisons.get("well_scaled"))
    return [speed(settings, own.headline), last]
