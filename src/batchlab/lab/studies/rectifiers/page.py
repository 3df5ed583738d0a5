"""The report of the study rectifiers."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from batchlab.lab.report import Block, FigureBlock, Page, Paragraph, Section, Table
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.rectifiers.answer import accuracy_text, answer, closing, steps_text, verdicts
from batchlab.lab.studies.rectifiers.settings import NORMALIZATIONS, STARTS, RectifiersSettings, cell
from batchlab.lab.studies.rectifiers.summary import Summary, trains
from batchlab.lab.studies.sections import footer, method_section

__all__ = ["accuracy_table", "build_page", "rate_table", "slope_table", "start_table", "steps_table", "verdict_table"]

SOURCE = "He, Zhang, Ren & Sun 2015, Delving Deep into Rectifiers (arXiv:1502.01852)."


def _by_depth(settings: RectifiersSettings, text: Callable[[str], str], caption: str, kind: str = "") -> Table:
    """A row for each nonlinearity, first weights and normalization; a column for each depth; `text` of each name."""
    rows = [
        [
            f"{start.label}, {words}",
            *(text(cell(name, depth, norm)) for depth in settings.depths),
        ]
        for norm, words in NORMALIZATIONS.items()
        for name, start in STARTS.items()
        if start.activation.startswith(kind)
    ]
    return Table(["hidden layers", *map(str, settings.depths)], rows, caption)


def accuracy_table(settings: RectifiersSettings, summary: Summary, caption: str) -> Table:
    """Test accuracy of every network, and how many of its runs train where not all do."""
    return _by_depth(settings, lambda name: accuracy_text(summary.cells[name]), caption)


def steps_table(settings: RectifiersSettings, summary: Summary, caption: str) -> Table:
    """Steps of every network to the target."""
    return _by_depth(settings, lambda name: steps_text(summary.cells[name]), caption)


def slope_table(settings: RectifiersSettings, summary: Summary, caption: str) -> Table:
    """The learned slopes of the first layer and of the deeper ones."""

    def text(name: str) -> str:
        result = summary.cells[name]
        if not result.slopes:
            return "–"
        first = f"{fmean(slopes[0] for slopes in result.slopes):.3f}"
        deeper = [fmean(slopes[1:]) for slopes in result.slopes if len(slopes) > 1]
        return f"{first}, {fmean(deeper):.3f}" if deeper else first

    return _by_depth(settings, text, caption, "prelu")


def start_table(settings: RectifiersSettings, summary: Summary, caption: str) -> Table:
    """How large the input of the last hidden layer's nonlinearity is before the first step, and how much is signal."""
    deepest = settings.depths[-1]
    rows = []
    for norm, words in NORMALIZATIONS.items():
        for name, start in STARTS.items():
            found = summary.cells[cell(name, deepest, norm)]
            theory = "1" if norm != "none" else f"{start.factor ** (deepest - 1):.2g}" if start.factor else "–"
            part = 100 * found.differing[-1]
            share = f"{part:.0f} %" if part >= 10 else f"{part:.2g} %" if part >= 1e-4 else "below 0.0001 %"
            gradient = f"{float(f'{found.gradients[0]:.2g}'):g}"
            rows.append([f"{start.label}, {words}", theory, f"{found.sizes[-1]:.2g}", share, gradient])
    header = ["network", "mean square in theory, first layer = 1", "measured", "differs between images", "gradient"]
    return Table(header, rows, caption)


def rate_table(settings: RectifiersSettings, summary: Summary, caption: str) -> Table:
    """The learning rates that were chosen, in brackets where not every run trains."""
    return _by_depth(
        settings,
        lambda name: f"{summary.chosen[name]:g}" if trains(summary.cells[name]) else f"({summary.chosen[name]:g})",
        caption,
    )


def verdict_table(settings: RectifiersSettings, summary: Summary, caption: str) -> Table:
    """The paper's statements, and what was found."""
    return Table(["the paper", "here"], verdicts(settings, summary), caption)


def _method(settings: RectifiersSettings, epochs: float) -> str:
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    return (
        f"Multilayer perceptrons with layers of {settings.width} units on pixels from 0 to 1, batches of "
        f"{settings.batch_size}, {settings.steps:,} steps ({epochs:.1f} epochs), momentum {settings.momentum:g}, a "
        f"learning rate that falls linearly to {100 * settings.final:g} % of the first, which is chosen for each "
        f"network from {rates} on held-out training images ({settings.search_seeds} of {settings.search_steps:,} "
        "steps at each rate). First weights are Gaussian with n Var[w] = 1 (Xavier) or n Var[w] = 2/(1 + a²) behind a "
        "rectifier of slope a (He), n a layer's inputs; biases are 0. The formulas agree for a sigmoid, which is no "
        "rectifier, so it has one arm. PReLU has one slope a layer, 0.25 at the start, trained with momentum and the "
        "layer's rate, as in the paper. Slopes have no weight decay there; here nothing has. The paper's networks are "
        "convolutional, its data are ImageNet; its Xavier start has n as here. Batch norm stands in front of each "
        "nonlinearity. A network's accuracy is the mean over the evaluations in the last tenth of its steps; a run "
        "that diverged counts as guessing. All runs of a seed share the order of images. Intervals are 95 % intervals "
        "(Student's t over seeds), each for itself: of twenty comparisons without any difference one would look clear."
    )


def build_page(finished: Finished, summary: Summary, command: str, drawn: dict[str, str]) -> Page:
    """Put the report together; `drawn` are the figures."""
    settings: RectifiersSettings = finished.settings
    environment = next(iter(finished.records.values())).environment
    deepest = settings.depths[-1]
    seeds = "one run each" if settings.seeds == 1 else f"means over {settings.seeds} runs"
    slopes: list[Block] = [
        slope_table(
            settings,
            summary,
            "Learned slope of the first hidden layer, and the mean of the deeper layers; means over runs. All start "
            "at 0.25.",
        )
    ]
    if "slopes" in drawn:
        caption = f"Learned slope of each layer in the networks with {deepest} hidden layers; bands: 95 % intervals."
        slopes.append(FigureBlock(drawn["slopes"], caption))
    return Page(
        title="Rectifiers and their first weights: what do they add, and does batch norm make them unnecessary?",
        question=(
            "He et al. (2015) start rectifiers from weights that keep a signal's size, and let the network learn the "
            "slope of its rectifiers. Which networks does that make trainable, and which does batch norm?"
        ),
        answer=answer(settings, summary),
        hero=FigureBlock(
            drawn["cells"],
            f"Share of test images recognized after {settings.steps:,} steps, in per cent, {seeds}, each network at "
            f"its own best learning rate. Blue: every run recognizes {100 * settings.trains_from:g} % or more. Orange: "
            "not every run does; where some do, their number is given instead. Guessing gets about 10 %.",
        ),
        sections=[
            Section(
                "What the paper says, and what was found", [verdict_table(settings, summary, "Claims and findings.")]
            ),
            Section(
                "Before the first step",
                [
                    FigureBlock(
                        drawn["start-size"],
                        f"Mean square of what enters each layer's nonlinearity, {deepest} hidden layers, no batch "
                        "norm: in the paper's theory a ReLU halves it, and He's start makes up for that. Geometric "
                        "means over seeds; layers this narrow scatter about the theory, which is for wide ones.",
                    ),
                    FigureBlock(
                        drawn["start-signal"],
                        "How much of that mean square differs between images; the rest is the same for all of them, "
                        f"and says nothing. Drawn no lower than {1e-12:g}.",
                    ),
                    FigureBlock(
                        drawn["start-gradient"],
                        "The way back: mean square of the loss's gradient there. Where it is much larger in the first "
                        "layers than in the last, a rate that suits the last is too large for the first; where it is "
                        f"much smaller, the first hardly learn. Drawn no lower than {1e-12:g}; where lines lie on "
                        "one another, the table has the numbers.",
                    ),
                    start_table(
                        settings,
                        summary,
                        f"The last of {deepest} hidden layers before the first step: mean square of what enters its "
                        "nonlinearity, in theory (infinite width) and measured on 1,000 images; the share of it that "
                        "differs between images; and the mean square of the gradient in the first hidden layer, in the "
                        "last = 1. Geometric means over seeds. Batch norm sets the forward numbers anew in each layer.",
                    ),
                ],
            ),
            Section(
                "How good, and how fast",
                [
                    accuracy_table(
                        settings,
                        summary,
                        f"Test accuracy; in brackets 95 % intervals. A run trains if it ends at "
                        f"{100 * settings.trains_from:g} % or above.",
                    ),
                    steps_table(
                        settings,
                        summary,
                        f"Steps until {100 * settings.target:g} % of the test images are first recognized, means over "
                        f"the runs that got there; evaluations are {100 * settings.spacing:g} % of the steps apart.",
                    ),
                ],
            ),
            Section("The slopes that PReLU learned", slopes),
            Section(
                "Is it only the learning rate?",
                [
                    *(
                        FigureBlock(
                            drawn[f"rate-search-{norm}"],
                            f"The search with {deepest} hidden layers, {words}: accuracy on held-out training images "
                            f"after {settings.search_steps:,} steps for each first learning rate; rings are the chosen "
                            "ones. The test images had no part in it.",
                        )
                        for norm, words in NORMALIZATIONS.items()
                    ),
                    rate_table(
                        settings,
                        summary,
                        "The chosen learning rates, in brackets where not every run trains with them. All were offered "
                        f"{', '.join(f'{rate:g}' for rate in settings.rates)}.",
                    ),
                    Paragraph(closing(summary)),
                ],
            ),
            method_section(_method(settings, settings.steps * settings.batch_size / finished.training_images), command),
        ],
        footer=footer(f"Data: {finished.data['description']}", environment, SOURCE),
    )
