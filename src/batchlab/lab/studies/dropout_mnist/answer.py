"""The study dropout-mnist in sentences: whatever the numbers say, and how sure they are."""

from __future__ import annotations

from batchlab.lab.studies.dropout_mnist.settings import DropoutMnistSettings
from batchlab.lab.studies.dropout_mnist.summary import Summary
from batchlab.lab.studies.sentences import difference, percent, times

__all__ = ["answer", "verdicts"]


def answer(settings: DropoutMnistSettings, summary: Summary) -> list[str]:
    """The sentences that open the report: how good; how fast."""
    errors = summary.errors
    wide = " and ".join(map(str, settings.widths))
    good = (
        f"Of the test images, {wide} units with independent dropout get {percent(errors['independent'])} wrong and "
        f"with batchwise dropout {percent(errors['batchwise'])}: "
        f"{difference(summary.differences['batchwise - independent'])}. Without dropout it is "
        f"{percent(errors['none'])}, and with {' and '.join(map(str, settings.small_widths))} units "
        f"{percent(errors['small'])}."
    )
    if not summary.speedup:
        return [good]
    seconds = summary.seconds_per_epoch
    fast = (
        f"An epoch of training takes {seconds['batchwise']:.1f} seconds with batchwise dropout, "
        f"{seconds['independent']:.1f} with independent dropout and {seconds['none']:.1f} without: "
        f"{times(summary.speedup['independent'])} and {times(summary.speedup['none'])} as long."
    )
    return [good, fast]


def verdicts(settings: DropoutMnistSettings, summary: Summary) -> list[list[str]]:
    """What the paper says, and what was found: rows of a table."""
    found = [epoch for epoch in summary.first_without_errors if epoch is not None]
    of = f"{len(found)} of {settings.seeds} runs"
    zero = f"in {of}, first after {min(found):.0f} to {max(found):.0f} epochs" if found else f"in {of}"
    at_20 = summary.errors_at_epoch_20
    if at_20:
        zero += f"; after 20 epochs {min(at_20)} to {max(at_20)} errors were left"
    gain = summary.differences["batchwise - none"]
    return [
        ["80 and 80 units learn the training set perfectly in about 20 epochs", zero],
        ["... with a test error of about 2 %", percent(summary.errors["small"])],
        [
            "ten times the units and dropout: about 1.1 %",
            f"{percent(summary.errors['independent'])} independent, {percent(summary.errors['batchwise'])} batchwise",
        ],
        [
            "independent and batchwise dropout are equally good",
            difference(summary.differences["batchwise - independent"]) + ", batchwise against independent",
        ],
        ["(not in the paper) batchwise dropout against none, same network", difference(gain)],
    ]
