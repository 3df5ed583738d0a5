"""The report of the study dropout-patterns: sentences, tables, figures."""

from __future__ import annotations

from batchlab.lab.comparison import Estimate, estimate
from batchlab.lab.figures import Line, line_figure, rate_search
from batchlab.lab.report import FigureBlock, Page, Section, Table
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.dropout_patterns.settings import DropoutPatternsSettings, label, legend
from batchlab.lab.studies.dropout_patterns.summary import Summary
from batchlab.lab.studies.sections import DROPOUT_PAPER, footer, method_section, rate_section
from batchlab.lab.studies.sentences import difference, percent, points

__all__ = ["answer", "build_page", "error_table", "figures", "verdict_table"]


def answer(settings: DropoutPatternsSettings, summary: Summary) -> list[str]:
    """The sentences that open the report."""
    few = min(settings.patterns)
    worst = _worst(settings, summary)
    if summary.enough is None:
        most = max(settings.patterns)
        end = f"even {most:,} patterns differ clearly from a new one each batch."
    else:
        end = f"from {summary.enough:,} patterns on there is no clear difference to a new one each batch."
    between = "" if worst == few else f", with {_count(worst)}, the worst number, {_error(summary, worst)}"
    return [
        f"With an exact number of kept units {percent(summary.errors['exact'])} of the test images are recognized "
        f"wrongly, with units kept independently {percent(summary.errors['bernoulli'])}: "
        f"{difference(summary.more_than_exact['bernoulli'])}.",
        f"With {_count(few)} for the whole training it is {_error(summary, few)}{between}; {end}",
    ]


def _worst(settings: DropoutPatternsSettings, summary: Summary) -> int:
    return max(settings.patterns, key=lambda number: summary.errors[f"patterns{number}"].mean)


def _count(number: int) -> str:
    return f"{number:,} {'pattern' if number == 1 else 'patterns'}"


def _error(summary: Summary, number: int) -> str:
    return percent(summary.errors[f"patterns{number}"])


def error_table(summary: Summary, caption: str) -> Table:
    """Each arm's test error, and how much more it is than with a new exact pattern each batch."""

    def more(name: str) -> str:
        return points(summary.more_than_exact[name]) if name in summary.more_than_exact else "–"

    rows = [
        [label(name), f"{summary.chosen[name]:g}", percent(summary.errors[name]), more(name)] for name in summary.errors
    ]
    return Table(["dropout", "learning rate", "test error", "more than exact, points"], rows, caption)


def verdict_table(settings: DropoutPatternsSettings, summary: Summary, caption: str) -> Table:
    """The paper's statements, as far as they are known, and what was found."""
    numbers = dict.fromkeys([min(settings.patterns), _worst(settings, summary)])
    found = ", ".join(f"{_error(summary, number)} with {_count(number)}" for number in numbers)
    enough = "more than were tried" if summary.enough is None else f"{summary.enough:,}"
    rows = [
        ["a fixed number of units, or each for itself: both work", difference(summary.more_than_exact["bernoulli"])],
        [
            "few different patterns hurt; one is a single, smaller network",
            f"{found}, against {percent(summary.errors['exact'])}",
        ],
        ["(no number in the paper) patterns that are enough here", enough],
    ]
    return Table(["the paper", "here"], rows, caption)


def figures(finished: Finished, summary: Summary) -> dict[str, str]:
    """All figures of the study, by name, as SVG."""
    settings = finished.settings
    numbers = sorted(settings.patterns)
    limited = [summary.errors[f"patterns{n}"] for n in numbers]

    def level(value: Estimate) -> Line:
        ends = [numbers[0], numbers[-1]]
        return Line(ends, [value.mean] * 2, [value.low] * 2, [value.high] * 2, dashed=True)

    lines = {
        "so many, in turn": Line(
            numbers, [e.mean for e in limited], [max(e.low, 1e-4) for e in limited], [e.high for e in limited]
        ),
        legend("exact"): level(summary.errors["exact"]),
        legend("bernoulli"): level(summary.errors["bernoulli"]),
    }
    lowest = min(value.mean for value in summary.errors.values())
    highest = max(value.mean for value in summary.errors.values())
    limits = (0.8 * lowest, 1.25 * highest)
    drawn = {
        "patterns": line_figure(
            "patterns",
            lines,
            x_label="different patterns",
            y_label="test error",
            log_x=True,
            log_y=True,
            percent=True,
            limits=limits,
            ticks=[t for t in (0.01, 0.012, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5) if limits[0] <= t <= limits[1]],
            description="Test error against the number of different dropout patterns",
        )
    }
    epoch = finished.training_images / settings.batch_size
    shown = ["exact", "bernoulli", *(f"patterns{n}" for n in (numbers[0], numbers[len(numbers) // 2]))]
    curves = {}
    most = min(1.0, 4 * highest)
    for name in dict.fromkeys(shown):
        runs = [r for r in finished.runs(name) if not r.diverged]
        if runs:
            steps = runs[0].curve[0]
            means = [estimate([1 - r.metrics[i]["accuracy"] for r in runs]).mean for i in range(len(steps))]
            curves[legend(name)] = Line([step / epoch for step in steps[1:]], means[1:])
    drawn["test-error"] = line_figure(
        "test-error",
        curves,
        x_label="epochs",
        y_label="test error",
        log_y=True,
        percent=True,
        limits=(0.8 * lowest, most),
        ticks=[t for t in (0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5) if 0.8 * lowest <= t <= most],
        description="Test error against epochs for few and many patterns",
    )
    drawn["rate-search"] = rate_search(
        "rate-search",
        {legend(arm): summary.scores[arm] for arm in dict.fromkeys(shown)},
        {legend(arm): summary.chosen[arm] for arm in dict.fromkeys(shown)},
        description="Validation accuracy against learning rate for some arms, the chosen rate ringed",
    )
    return drawn


def build_page(finished: Finished, summary: Summary, command: str, drawn: dict[str, str]) -> Page:
    """Put the report together; `drawn` are the `figures`."""
    settings = finished.settings
    epochs = settings.steps * settings.batch_size / finished.training_images
    environment = next(iter(finished.records.values())).environment
    widths = " and ".join(map(str, settings.widths))
    method = (
        f"A network of {widths} ReLU units on pixels from 0 to 1, {100 * settings.input_dropout:g} % of the inputs and "
        f"{100 * settings.hidden_dropout:g} % of the hidden units dropped, {epochs:.0f} epochs in batches of "
        f"{settings.batch_size}, Nesterov momentum {settings.momentum:g}, a learning rate that falls exponentially to "
        f"{100 * settings.final:.0f} % of the first, which is chosen for each arm on held-out training images. "
        "Patterns of inputs and both layers are drawn together; with n patterns, batch i uses number i mod n. "
        "Evaluation always uses the whole network, so units that no pattern ever keeps stay at their random start and "
        "take part: with one pattern that is what the error shows. A run's test error is the mean over the evaluations "
        "in its last tenth."
    )
    return Page(
        title="How many dropout patterns does a network need?",
        question=(
            "Batchwise dropout draws one pattern for a whole batch. Does it matter how it is drawn, and how often? "
            "After Graham, Reizenstein & Robinson (2015), sections 2 and 3.1."
        ),
        answer=answer(settings, summary),
        hero=FigureBlock(
            drawn["patterns"],
            "Share of test images recognized wrongly, when training uses only so many different patterns in turn. "
            f"Dashed: a new pattern for each of the {settings.steps:,} batches. Means over {settings.seeds} seeds, "
            "bands their 95 % intervals.",
        ),
        sections=[
            Section(
                "What the paper says, and what was found", [verdict_table(settings, summary, "Claims and findings.")]
            ),
            Section(
                "All arms",
                [
                    error_table(
                        summary,
                        "Test error after the last step. The last column is the paired difference to a new exact "
                        "pattern each batch, in percentage points. In brackets: 95 % intervals over seeds.",
                    ),
                    FigureBlock(drawn["test-error"], "The same over training, for some of the arms: means over seeds."),
                ],
            ),
            rate_section(drawn["rate-search"], settings.search_steps),
            method_section(method, command),
        ],
        footer=footer(f"Data: {finished.data['description']}", environment, DROPOUT_PAPER),
    )
