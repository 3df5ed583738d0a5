"""The report of the study dropout-or-bn."""

from __future__ import annotations

from batchlab.lab.report import FigureBlock, Page, Paragraph, Section, Table
from batchlab.lab.studies.arm_results import steps_table
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_or_bn.answer import answer, details, edge_sentence, expected_text, verdicts
from batchlab.lab.studies.dropout_or_bn.arms import named_arms
from batchlab.lab.studies.dropout_or_bn.settings import DropoutOrBnSettings
from batchlab.lab.studies.dropout_or_bn.summary import Summary
from batchlab.lab.studies.sections import footer, method_section
from batchlab.lab.studies.sentences import percent, points

__all__ = ["build_page", "error_table", "pace_tables", "shift_table", "verdict_table"]

SOURCES = (
    "Ioffe & Szegedy 2015, Batch Normalization (arXiv:1502.03167); Li, Chen, Hu & Yang 2018, Understanding the "
    "Disharmony between Dropout and Batch Normalization by Variance Shift (arXiv:1801.05134); Graham, Reizenstein & "
    "Robinson 2015, batchwise dropout (arXiv:1502.02478)."
)


def error_table(settings: DropoutOrBnSettings, summary: Summary, caption: str) -> Table:
    """Each arm's rate and test error, and what each of the two adds to the other."""
    rows = []
    for name, arm in named_arms(settings).items():
        dropout = summary.to_batch_norm.get(name) or summary.to_neither.get(name)
        norm = summary.to_dropout.get(name)
        diverged = f" ({summary.diverged[name]} of {settings.seeds} diverged)" if name in summary.diverged else ""
        cells = ["–" if value is None else points(value) for value in (dropout, norm)]
        rows.append([arm.label, f"{summary.chosen[name]:g}", percent(summary.errors[name]) + diverged, *cells])
    return Table(["network", "learning rate", "test error", "by its dropout", "by its BN"], rows, caption)


def shift_table(settings: DropoutOrBnSettings, summary: Summary, caption: str) -> Table:
    """For each arm with batch norm the shifts of its worst layer, and what recalibration changes."""
    arms = named_arms(settings)
    rows = []
    for name, found in summary.statistics.items():
        layer = found.worst
        expected = expected_text(found.expected.get(layer))
        number = layer.removeprefix("normalization")
        shifts = [number, f"{found.variance[layer]:.2f}", expected, f"{found.mean[layer]:.2f}"]
        rows.append([arms[name].label, *shifts, points(found.repair)])
    header = ["network", "layer", "variance off by", "theory", "mean off by", "error by recalibration, points"]
    return Table(header, rows, caption)


def pace_tables(settings: DropoutOrBnSettings, summary: Summary, captions: tuple[str, str]) -> list[Table]:
    """Steps, and seconds of one core, to each target."""
    labels = {name: arm.label for name, arm in named_arms(settings).items()}
    return [
        steps_table(summary.results, labels, captions[0]),
        steps_table(summary.results, labels, captions[1], seconds=True),
    ]


def verdict_table(settings: DropoutOrBnSettings, summary: Summary, caption: str) -> Table:
    """What the papers say, and what was found."""
    return Table(["question", "here"], verdicts(settings, summary), caption)


def _method(settings: DropoutOrBnSettings, summary: Summary) -> str:
    widths = ", ".join(map(str, settings.widths))
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    epochs = settings.steps * settings.batch_size / summary.images
    conv = (
        f" The convolutional network has {' and '.join(map(str, settings.channels))} 3x3 filters, each layer with a "
        f"2x2 max pooling, then {', '.join(map(str, settings.channel_widths))} units; dropout takes whole feature maps "
        "there."
        if settings.channels
        else ""
    )
    return (
        f"A multilayer perceptron of {widths} rectified linear units, He's first weights, pixels from 0 to 1, batches "
        f"of {settings.batch_size}. It is trained on {summary.images:,} images, another stratified choice for each "
        f"seed, so that there is something to overfit: {settings.steps:,} steps, {epochs:g} epochs; with all images "
        f"dropout has less to prevent. Nesterov's momentum {settings.momentum:g}, a learning rate that falls linearly "
        f"to {100 * settings.final:g} % of the first, which is chosen for each network from {rates} on held-out "
        "training images. All networks of a seed share the first weights of each layer, the images and their order. "
        "Dropout is never on the inputs. It lies between the layers, behind each activation; or before BN, between "
        "each layer and its batch norm; or last, behind the last activation only, after every batch norm. "
        "Batchwise dropout takes the same units for all images of a batch, and changes the weights of kept units "
        "alone. Test errors are means over the evaluations of the last tenth of the steps; a run that diverged "
        "counts as guessing, 90 %. Recalibration replaces the running averages by the statistics of the training "
        "images with dropout off, and "
        f"leaves all weights.{conv}"
    )


def _rates(settings: DropoutOrBnSettings, summary: Summary, drawn: dict[str, str]) -> Section:
    caption = (
        f"Accuracy on held-out training images after {settings.search_steps:,} steps for each first learning rate; "
        "rings are the chosen ones, and what lies below the lower edge is drawn on it. The test images had no part in "
        "it."
    )
    names = ("without batch norm", "with batch norm", "with batchwise dropout", "convolutional networks")
    figures = [
        FigureBlock(drawn[f"rate-search-{i}"], f"The search, {name}. {caption}")
        for i, name in enumerate(names, 1)
        if f"rate-search-{i}" in drawn
    ]
    return Section("Is it only the learning rate?", [Paragraph(edge_sentence(settings, summary)), *figures])


def build_page(finished: Finished, summary: Summary, command: str, drawn: dict[str, str]) -> Page:
    """Put the report together; `drawn` are the figures."""
    settings: DropoutOrBnSettings = finished.settings
    environment = next(iter(finished.records.values())).environment
    seeds = "One run each." if settings.seeds == 1 else f"Means of {settings.seeds} runs, lines their 95 % intervals."
    explained, *others = details(settings, summary) or [""]
    return Page(
        title="Can batch norm replace dropout, and do they get on with each other?",
        question=(
            "With batch norm, dropout is often left out; with both, dropout shifts the variance that batch norm has "
            "learned. Is batch norm alone as good as dropout alone, are both better or worse, and is the shift to "
            "blame?"
        ),
        answer=answer(settings, summary),
        hero=FigureBlock(
            drawn["errors"],
            f"Share of test images recognized wrongly, each network at its own best learning rate. {seeds} The dotted "
            "line is the multilayer perceptron with batch norm (BN) and without dropout. Dropout is between the "
            "layers, directly before each BN, or last, after all BN.",
        ),
        sections=[
            Section(
                "Which is best?",
                [
                    error_table(
                        settings,
                        summary,
                        "Test error; then what it has more than the same network without its dropout, and without its "
                        "batch norm, in percentage points, paired by seed. In brackets: 95 % intervals, one in twenty "
                        "of which misses by chance.",
                    ),
                    verdict_table(settings, summary, "What the papers say, and what was found."),
                ],
            ),
            Section(
                "Does the shift explain it?",
                [
                    Paragraph(explained),
                    FigureBlock(
                        drawn["recalibration"],
                        "What changes when the running averages are replaced by statistics taken with dropout off, the "
                        f"weights untouched. Left of the line: fewer errors. {seeds}",
                    ),
                    shift_table(
                        settings,
                        summary,
                        "The batch norm with the largest shift of each network: how many times too large or too small "
                        "the variance is that it divides by, mean over its units; what theory expects from the trained "
                        "weights and the one dropout directly in front; how far its mean is off, in standard "
                        "deviations. Theory leaves out convolutions, and noise that comes through earlier layers.",
                    ),
                    *map(Paragraph, others),
                ],
            ),
            Section(
                "How fast?",
                [
                    FigureBlock(drawn["test-error"], f"Test error while training. {seeds.replace('lines', 'bands')}"),
                    *pace_tables(
                        settings,
                        summary,
                        (
                            "Training steps until a test accuracy is first reached, means over the runs that reached "
                            "it; how many times fewer than with neither.",
                            "The same in seconds of one core, training alone.",
                        ),
                    ),
                ],
            ),
            _rates(settings, summary, drawn),
            method_section(_method(settings, summary), command),
        ],
        footer=footer(f"Data: {finished.data['description']}", environment, SOURCES),
    )
