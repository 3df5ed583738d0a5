"""The report of the study factorization."""

from __future__ import annotations

from typing import Final

from batchlab.lab.report import Block, FigureBlock, Page, Paragraph, Section, Table
from batchlab.lab.studies.arm_results import accuracy_table, steps_table
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.factorization.answer import answer, ends, kept, reached, search_note, seconds, verdict
from batchlab.lab.studies.factorization.figures import PANELS
from batchlab.lab.studies.factorization.settings import (
    ARMS,
    BASELINE,
    LABELS,
    REFERENCE,
    STARTS,
    FactorizationSettings,
    full_name,
)
from batchlab.lab.studies.factorization.summary import StartSummary, Summary
from batchlab.lab.studies.sections import footer, method_section

__all__ = ["build_page", "chosen_rates", "share_table", "verdict_table"]

SOURCES = (
    "Ioffe & Szegedy 2015 (arXiv:1502.03167); Salimans & Kingma 2016, Weight Normalization (arXiv:1602.07868); Huang "
    "et al. 2017, Centered Weight Normalization; Qiao et al. 2019, Weight Standardization (arXiv:1903.10520); "
    "Neyshabur et al. 2015, Path-SGD (arXiv:1506.02617); Desjardins et al. 2015, Natural Neural Networks "
    "(arXiv:1507.00210); Hoffer et al. 2017, ghost batches (arXiv:1705.08741)."
)

_TITLES: Final = {"weights": "weights alone", "activations": "statistics of activations"}


def _share(found: StartSummary, name: str) -> str:
    if found.target is None:
        return "–"
    if name in (BASELINE, REFERENCE):
        return "0 %, by definition" if name == BASELINE else "100 %, by definition"
    if name in found.shares:
        return kept(found.shares[name])
    return "no gain to share" if name in found.than_reference else reached(found.results[name], found.target)


def share_table(settings: FactorizationSettings, summary: Summary, caption: str) -> Table:
    """What each arm looks at, and the share that it keeps from each start."""
    header = ["arm", "looks at"]
    for start in settings.starts:
        target = summary.starts[start].target
        header.append(f"from {STARTS[start]}" if target is None else f"from {STARTS[start]}, to {100 * target:g} %")
    rows = [
        [arm.label, arm.looks_at, *(_share(summary.starts[start], name) for start in settings.starts)]
        for name, arm in ARMS.items()
    ]
    return Table(header, rows, caption)


def verdict_table(found: StartSummary, caption: str) -> Table:
    """Each arm's steps against batch norm's, and what its share says."""
    rows = []
    for name, ratio in found.than_reference.items():
        interval = "" if ratio.low != ratio.low else f" ({ratio.low:.2f} to {ratio.high:.2f})"
        share = found.shares.get(name)
        said = "–" if share is None else verdict(share)
        rows.append([LABELS[name], f"{ratio.mean:.2f}{interval}", said])
    return Table(["arm", "steps of batch norm over its own", "of batch norm's gain"], rows, caption)


def chosen_rates(summary: Summary, start: str) -> dict[str, float]:
    """Each arm's best rate from a start."""
    return {name: summary.chosen[full_name(name, start)] for name in ARMS}


def _start_section(settings: FactorizationSettings, summary: Summary, start: str, drawn: dict[str, str]) -> Section:
    found = summary.starts[start]
    blocks: list[Block] = [
        FigureBlock(
            drawn[f"accuracy-{panel}-{start}"],
            f"From {STARTS[start]}, arms that look at {_TITLES[panel]}, with the plain network and batch norm: share "
            "of test images recognized against training steps, each arm at its own best learning rate; bands are 95 % "
            "intervals.",
        )
        for panel in PANELS
        if f"accuracy-{panel}-{start}" in drawn
    ]
    if found.than_reference and found.target is not None:
        blocks.append(
            verdict_table(
                found,
                f"From {STARTS[start]}: how many times fewer steps than batch norm each arm needs to "
                f"{100 * found.target:g} %, and what that says of batch norm's gain over the plain network. In "
                "brackets: 95 % intervals.",
            )
        )
    blocks += [
        steps_table(
            found.results,
            LABELS,
            f"From {STARTS[start]}: training steps until a test accuracy is first reached, means over the runs that "
            "reached it; how many times fewer than the plain network, paired by seed.",
        ),
        Paragraph(seconds(start, found)),
        steps_table(
            found.results,
            LABELS,
            f"From {STARTS[start]}: the same in seconds of one core, training alone.",
            seconds=True,
        ),
        Paragraph(ends(settings, start, found)),
        accuracy_table(
            found.results,
            LABELS,
            chosen_rates(summary, start),
            f"From {STARTS[start]}: test accuracy at the end of {settings.steps:,} steps, the mean over the last "
            "tenth; the baseline is the plain network. A run that diverged counts as guessing, 10 %.",
        ),
    ]
    return Section(f"From {STARTS[start]}", blocks)


def _rates_section(settings: FactorizationSettings, summary: Summary, drawn: dict[str, str]) -> Section:
    figures = [
        FigureBlock(
            drawn[f"rate-search-{panel}-{start}"],
            f"The search from {STARTS[start]}, {_TITLES[panel]}: accuracy on held-out training images after "
            f"{settings.search_steps:,} steps for each learning rate; rings are the chosen ones, what is below the "
            "figure lies on its edge. The test images had no part in it.",
        )
        for start in settings.starts
        for panel in PANELS
    ]
    return Section("Is it only the learning rate?", [Paragraph(search_note(settings, summary)), *figures])


def _method(settings: FactorizationSettings) -> str:
    widths = ", ".join(map(str, settings.widths))
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    small = (
        f" The small start draws all weights with standard deviation {settings.small_std:g}, with which signals and "
        "gradients shrink from layer to layer."
        if "small" in settings.starts
        else ""
    )
    scaled = "; ".join(
        f"for {arm.label} from {STARTS[start]} times {scale:g}"
        for arm in ARMS.values()
        for start, scale in arm.rate_scales.items()
        if scale != 1 and start in settings.starts
    )
    return (
        f"A network of {widths} ReLU units, pixels from 0 to 1, batches of {settings.batch_size}, momentum "
        f"{settings.momentum:g} in all arms, a constant learning rate chosen for each arm from {rates} on held-out "
        f"training images ({scaled}). He's start draws weights with variance 2/inputs (1/inputs in the first layer)."
        f"{small} Arms with the same seed share the weights that are drawn, and the order of images. The three weight "
        "norms then choose their gains and biases on 500 training images, as the weight norm paper does, so that each "
        "unit has mean 0 and deviation 1 there; that changes the function that they start from. Population batch norm "
        "normalizes by statistics of earlier batches, without a gradient through them: held, those of the last 10, "
        "renewed every 10 steps; running, an average to which each batch adds with weight 0.1. Ghost batch norm "
        "normalizes by the statistics of 25 images; mean-only batch norm subtracts the batch's mean behind layers with "
        "weight norm. Natural coordinates whiten each layer's inputs; they are renewed every "
        f"{settings.refresh_every} steps from the images since, with {settings.natural_eps:g} added to the covariance, "
        "and momentum is carried over. Path-SGD leaves the weights and divides their gradients by what paths through "
        "them weigh. The share of batch norm's gain that an arm keeps is log(plain steps / its steps) / log(plain "
        "steps / batch norm's steps), means over seeds above and below, with Fieller's 95 % interval; it is taken at "
        "the hardest accuracy that all runs of the plain network and of batch norm reach. No correction is made for "
        "the number of comparisons."
    )


def build_page(finished: Finished, summary: Summary, command: str, drawn: dict[str, str]) -> Page:
    """Put the report together; `drawn` are the figures."""
    settings: FactorizationSettings = finished.settings
    environment = next(iter(finished.records.values())).environment
    seeds = "One run each." if settings.seeds == 1 else f"{settings.seeds} runs of each arm, lines are 95 % intervals."
    first = settings.starts[0]
    hero = (
        FigureBlock(
            drawn["shares"],
            "How much of batch norm's gain each arm keeps, in training steps on a logarithmic scale: 0 % needs as many "
            "as the plain network, 100 % as few as batch norm. Arms that did not reach the accuracy in every run have "
            f"no mark. {seeds} A line that ends in an arrow goes on beyond the figure.",
        )
        if "shares" in drawn
        else FigureBlock(
            drawn.get(f"accuracy-activations-{first}", drawn[f"rate-search-activations-{first}"]),
            f"Batch norm has no clear gain here that could be shared. Arms with statistics of activations, from "
            f"{STARTS[first]}; {seeds}",
        )
    )
    return Page(
        title="How much of batch norm's gain is a factorization?",
        question=(
            "Batch normalization can be read as another factorization of Wu + b: a direction, a gain and a shift. Is "
            "there a factorization that learns as fast without the statistics of each batch?"
        ),
        answer=answer(settings, summary),
        hero=hero,
        sections=[
            Section(
                "What each arm keeps",
                [
                    share_table(
                        settings,
                        summary,
                        "Share of batch norm's gain, from the training steps to an accuracy on the test images; in "
                        "brackets 95 % intervals, paired by seed.",
                    )
                ],
            ),
            *(_start_section(settings, summary, start, drawn) for start in settings.starts),
            _rates_section(settings, summary, drawn),
            method_section(_method(settings), command),
        ],
        footer=footer(f"Data: {finished.data['description']}", environment, SOURCES),
    )
