"""The report of the study whitening."""

from __future__ import annotations

from batchlab.lab.report import FigureBlock, Page, Section, Table
from batchlab.lab.studies.arm_results import accuracy_table, steps_table
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.sections import footer, method_section, rate_section
from batchlab.lab.studies.whitening.settings import ARMS, WhiteningSettings
from batchlab.lab.studies.whitening.summary import Summary, answer, verdicts

__all__ = ["build_page", "verdict_table"]

SOURCES = (
    "Ioffe & Szegedy 2015, Batch Normalization (arXiv:1502.03167); Huang et al. 2018, Decorrelated Batch Normalization "
    "(arXiv:1804.08450); Huang et al. 2019, Iterative Normalization (arXiv:1904.03441)."
)


def verdict_table(summary: Summary, caption: str, seconds: bool = False) -> Table:
    """Each part of batch norm, and what goes further, against batch norm, in steps or seconds."""
    target = "a target" if summary.target is None else f"{100 * summary.target:g} %"
    unit = "seconds" if seconds else "steps"
    return Table(["arm", f"{unit} of batch norm over its own, to {target}"], verdicts(summary, seconds), caption)


def _method(settings: WhiteningSettings) -> str:
    widths = ", ".join(map(str, settings.widths))
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    return (
        f"The network of the batch normalization paper, wider: {widths} sigmoid units, a normalization in front of "
        f"each nonlinearity, pixels from 0 to 1, batches of {settings.batch_size}, momentum {settings.momentum:g}, a "
        f"constant learning rate chosen for each arm from {rates} on held-out training images. First weights are "
        f"Gaussian with standard deviation {settings.weight_std:g}; all arms share them, and the order of images. "
        "Centering subtracts the batch's mean; rescaling divides by its standard deviation about the mean, and leaves "
        "the mean; batch norm does both; whitening also removes the correlations within groups of neighbouring "
        "channels, by the inverse square root of their covariance (ZCA) or by five steps of Newton's iteration. All "
        "have a learned shift, and but for centering a learned scale. Gradients flow through the statistics; "
        "evaluation uses running statistics. A layer in front of a normalization has no bias of its own."
    )


def build_page(finished: Finished, summary: Summary, command: str, drawn: dict[str, str]) -> Page:
    """Put the report together; `drawn` are the figures."""
    settings: WhiteningSettings = finished.settings
    environment = next(iter(finished.records.values())).environment
    seeds = "One run each." if settings.seeds == 1 else f"Means over {settings.seeds} runs, bands their 95 % intervals."
    return Page(
        title="What do centering, rescaling and whitening each contribute?",
        question=(
            "Batch normalization centres and rescales each unit over the batch; full whitening would also take the "
            "correlations. Which part makes networks learn faster, and is more of it better?"
        ),
        answer=answer(settings, summary),
        hero=FigureBlock(
            drawn["accuracy"],
            f"Share of test images recognized against training steps, each arm at its own best learning rate. {seeds}",
        ),
        sections=[
            Section(
                "Steps",
                [
                    steps_table(
                        summary.results,
                        ARMS,
                        "Training steps until a test accuracy is first reached, means over the runs that reached it; "
                        "how many times fewer than without normalization, paired by seed.",
                    ),
                    verdict_table(summary, "Above 1: fewer steps than batch norm. In brackets: 95 % intervals."),
                ],
            ),
            Section(
                "Seconds",
                [
                    steps_table(
                        summary.results,
                        ARMS,
                        "The same in seconds of one core, training alone. A step of whitening costs more.",
                        seconds=True,
                    ),
                    *(
                        [verdict_table(summary, "Above 1: fewer seconds than batch norm; each run's own pace.", True)]
                        if summary.seconds_than_batch_norm
                        else []
                    ),
                ],
            ),
            Section(
                "Where training ends",
                [
                    accuracy_table(
                        summary.results,
                        ARMS,
                        summary.chosen,
                        f"Test accuracy at the end of {settings.steps:,} steps, the mean over the last tenth; the "
                        "baseline is the network without normalization.",
                    )
                ],
            ),
            rate_section(drawn["rate-search"], settings.search_steps),
            method_section(_method(settings), command),
        ],
        footer=footer(f"Data: {finished.data['description']}", environment, SOURCES),
    )
