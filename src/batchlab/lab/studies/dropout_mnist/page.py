"""The report of the study dropout-mnist: from summary and records to a page."""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.lab.comparison import estimate
from batchlab.lab.figures import Line, line_figure, rate_search
from batchlab.lab.records import RunRecord
from batchlab.lab.report import FigureBlock, Page, Section, Table
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_mnist.answer import answer, verdicts
from batchlab.lab.studies.dropout_mnist.settings import ARMS, DropoutMnistSettings
from batchlab.lab.studies.dropout_mnist.summary import Summary, Target
from batchlab.lab.studies.sections import DROPOUT_PAPER, footer, method_section, rate_section
from batchlab.lab.studies.sentences import percent

__all__ = ["build_page", "error_table", "figures", "target_table", "verdict_table"]


def _error_line(records: Sequence[RunRecord], x: Sequence[float]) -> Line:
    points = [estimate([1 - r.metrics[index]["accuracy"] for r in records]) for index in range(len(x))]
    return Line(x, [p.mean for p in points], [max(p.low, 1e-4) for p in points], [p.high for p in points])


def figures(finished: Finished, summary: Summary) -> dict[str, str]:
    """All figures of the study, by name, as SVG."""
    epoch = finished.training_images / finished.settings.batch_size
    by_epoch, by_second = {}, {}
    for name, arm in ARMS.items():
        runs = [r for r in finished.runs(name) if not r.diverged]
        if not runs:
            continue
        steps = runs[0].curve[0]
        by_epoch[arm.label] = _error_line(runs, [step / epoch for step in steps])
        pace = summary.seconds_per_epoch[name]
        if pace is not None:
            line = by_epoch[arm.label]
            # From the first evaluation on: time zero has no place on a logarithmic axis.
            by_second[arm.label] = Line(
                [x * pace for x in line.x[1:]], line.y[1:], tuple(line.low)[1:], tuple(line.high)[1:]
            )
    lowest = min(min(line.y) for line in by_epoch.values())
    limits = (0.8 * lowest, min(1.0, 8 * lowest))
    ticks = [t for t in (0.005, 0.01, 0.012, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5) if limits[0] <= t <= limits[1]]
    names = " and ".join(by_epoch)
    drawn = {
        "test-error": line_figure(
            "test-error",
            by_epoch,
            x_label="epochs",
            y_label="test error",
            log_y=True,
            percent=True,
            limits=limits,
            ticks=ticks,
            description=f"Test error against epochs for {names}",
        )
    }
    if by_second:
        drawn["test-error-seconds"] = line_figure(
            "test-error-seconds",
            by_second,
            x_label="seconds of training on one core (each ten times the last)",
            y_label="test error",
            log_x=True,
            log_y=True,
            percent=True,
            limits=limits,
            ticks=ticks,
            description=f"Test error against training seconds for {names}",
        )
    small = {}
    for record in finished.runs("small"):
        steps = [line["step"] / epoch for line in record.metrics]
        # One error more: zero has no place on a logarithmic axis.
        small[f"seed {record.settings.seed}"] = Line(steps, [line["training_errors"] + 1 for line in record.metrics])
    drawn["training-errors"] = line_figure(
        "training-errors",
        small,
        x_label="epochs",
        y_label="training errors + 1",
        log_y=True,
        limits=(0.8, None),
        levels={"none left": 1},
        description="Wrongly recognized training images of the small network against epochs",
    )
    drawn["rate-search"] = rate_search(
        "rate-search",
        {ARMS[arm].label: rates for arm, rates in summary.scores.items()},
        {ARMS[arm].label: rate for arm, rate in summary.chosen.items()},
        description="Validation accuracy against learning rate for each arm, the chosen rate ringed",
    )
    return drawn


def error_table(summary: Summary, caption: str) -> Table:
    """Each arm's test error and what an epoch costs."""
    rows = []
    for name, arm in ARMS.items():
        seconds = summary.seconds_per_epoch[name]
        cost = "–" if seconds is None else f"{seconds:.1f}"
        rows.append([arm.label, f"{summary.chosen[name]:g}", percent(summary.errors[name]), cost])
    return Table(["network", "learning rate", "test error", "seconds an epoch"], rows, caption)


def _reached(values: Sequence[float | None]) -> str:
    got = [value for value in values if value is not None]
    if not got:
        return "never"
    text = f"{sum(got) / len(got):,.0f}"
    return text if len(got) == len(values) else f"{text} ({len(got)} of {len(values)} runs)"


def target_table(targets: Sequence[Target], caption: str) -> Table:
    """Training seconds until a test error is first reached."""
    rows = [[f"{100 * target.error:g} %", *(_reached(target.seconds[name]) for name in ARMS)] for target in targets]
    return Table(["test error", *(arm.label for arm in ARMS.values())], rows, caption)


def verdict_table(settings: DropoutMnistSettings, summary: Summary, caption: str) -> Table:
    """The paper's sentences, and what was found."""
    return Table(["the paper", "here"], verdicts(settings, summary), caption)


def _method(settings: DropoutMnistSettings, epochs: float) -> str:
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    return (
        "Section 1 of the paper names the networks; everything else is the authors' published code where it says: "
        f"pixels from 0 to 1, ReLU, {100 * settings.input_dropout:g} % of the inputs and "
        f"{100 * settings.hidden_dropout:g} % of the hidden units dropped, batches of {settings.batch_size}, Nesterov "
        f"momentum {settings.momentum:g}, weights uniform within ±1/√(inputs), zeros in the last layer, a learning "
        f"rate that falls exponentially to {100 * settings.final:.0f} % of the first. Their 200 epochs are "
        f"{epochs:.0f} here. Differences: all arms have the same first weights (theirs differ between the kinds of "
        "network), the scaling is inverted (1/(1-p) in training), patterns keep an exact number of units, and each "
        f"arm's first learning rate is chosen on held-out training images from {rates}. The authors' is 0.1 here "
        "without dropout, and 0.1 · (1-p)² behind a dropout of p, 0.025 for one half: the inverted scaling enlarges "
        "activations, gradients and so the steps. Batchwise dropout is trained by SubmatrixSGD, which, as their code, "
        "lets the momentum of dropped units rest. All arms share seeds, and with them first weights and the order of "
        "images. A run's test error is the mean over the evaluations in its last tenth."
    )


def build_page(finished: Finished, summary: Summary, command: str, drawn: dict[str, str]) -> Page:
    """Put the report together; `drawn` are the `figures`."""
    settings, images = finished.settings, finished.training_images
    epochs = settings.steps * settings.batch_size / images
    environment = next(iter(finished.records.values())).environment
    seeds = "one run" if settings.seeds == 1 else f"means over {settings.seeds} runs, bands their 95 % intervals"
    speed = [
        error_table(
            summary,
            "Test error after the last step, and training seconds for one pass over the training images on one core "
            "(evaluation not counted). In brackets: 95 % interval over seeds.",
        ),
        target_table(
            summary.targets,
            "Training seconds until a test error is first reached, means over the runs that reached it. The first "
            "evaluation below a line is partly luck; the comparison between arms is fair, all are evaluated equally "
            "often.",
        ),
    ]
    if "test-error-seconds" in drawn:
        caption = (
            f"The same runs against the time that training took on one core ({seeds}). To the left is faster. "
            "Batchwise dropout computes only the units that it keeps; independent dropout computes all and drops "
            "afterwards."
        )
        speed.insert(0, FigureBlock(drawn["test-error-seconds"], caption))  # type: ignore[arg-type]
    return Page(
        title="Dropout that never computes what it drops: does it learn as well?",
        question=(
            "A small network, a large one, and the large one with two kinds of dropout: the opening claim of Graham, "
            "Reizenstein & Robinson (2015), repeated with every choice made fairly."
        ),
        answer=answer(settings, summary),
        hero=FigureBlock(
            drawn["test-error"],
            f"Share of test images recognized wrongly, over {epochs:.0f} epochs; lines are {seeds}. Each arm has its "
            "own best learning rate.",
        ),
        sections=[
            Section(
                "What the paper says, and what was found", [verdict_table(settings, summary, "Claims and findings.")]
            ),
            Section("How long it takes", speed),
            Section(
                "The small network learns its training set by heart",
                [
                    FigureBlock(
                        drawn["training-errors"],
                        "Training images that the small network without dropout gets wrong, plus one, so that zero "
                        f"errors can be drawn: each line is a run, of {images:,} images. A network that makes no error "
                        "on what it was trained on has nothing left to learn from it; its test error stays.",
                    )
                ],
            ),
            rate_section(drawn["rate-search"], settings.search_steps),
            method_section(_method(settings, epochs), command),
        ],
        footer=footer(f"Data: {finished.data['description']}", environment, DROPOUT_PAPER),
    )
