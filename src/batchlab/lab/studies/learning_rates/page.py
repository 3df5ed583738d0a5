"""The report of the study learning-rates: tables and page."""

from __future__ import annotations

from statistics import fmean

from batchlab.lab.report import Block, FigureBlock, Page, Paragraph, Section, Table
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.learning_rates.answer import (
    answer,
    at_baseline,
    factor,
    growth_sentence,
    number,
    open_ends,
    span,
    verdict,
)
from batchlab.lab.studies.learning_rates.settings import (
    ACTIVATIONS,
    BASELINE,
    SCALE_FREE,
    LearningRatesSettings,
    arm,
    label,
)
from batchlab.lab.studies.learning_rates.summary import Condition, Limits, Summary
from batchlab.lab.studies.sections import footer, method_section
from batchlab.lab.studies.sentences import percent, points

__all__ = ["accuracy_table", "best_table", "build_page", "goal_table", "growth_table", "range_table", "verdict_table"]

SOURCES = (
    "Ioffe & Szegedy 2015, Batch Normalization (arXiv:1502.03167), sections 3.3 and 4.2; Salimans & Kingma 2016, "
    "Weight Normalization (arXiv:1602.07868); Qiao et al. 2019, Weight Standardization (arXiv:1903.10520); Hoffer "
    "et al. 2017, ghost batches (arXiv:1705.08741); Huang et al. 2018, Decorrelated Batch Normalization "
    "(arXiv:1804.08450)."
)


def range_table(settings: LearningRatesSettings, condition: Condition, caption: str) -> Table:
    """Between which rates each arm trains, how wide that is, and its largest rate against the baseline's."""
    rows = []
    for name, found in condition.limits.items():
        width = found.decades
        compared = [
            f"{factor(ratio)}: {verdict(ratio, settings.search_seeds)}" if ratio else "–"
            for ratio in (condition.largest.get(name), condition.than_batch_norm.get(name))
        ]
        rows.append([label(name), span(found), "–" if width is None else f"{width:.1f}", *compared])
    header = ["arm", "trains", "powers of ten", "largest rate against none", "against batch norm"]
    return Table(header, rows, caption)


def _trains(found: Limits, rate: float) -> bool:
    return found.lowest is not None and found.highest is not None and found.lowest <= rate <= found.highest


def accuracy_table(settings: LearningRatesSettings, condition: Condition, caption: str) -> Table:
    """Mean accuracy of each arm in per cent, at the rates that train any of them and their two neighbours."""
    rates = sorted(settings.rates)
    train = [
        place for place, rate in enumerate(rates) if any(_trains(found, rate) for found in condition.limits.values())
    ]
    if train:
        rates = rates[max(train[0] - 1, 0) : train[-1] + 2]
    rows = [
        [label(name), *(f"{100 * fmean(scores[rate]):.1f}" for rate in rates)]
        for name, scores in condition.scores.items()
    ]
    return Table(["arm", *(f"{rate:g}" for rate in rates)], rows, caption)


def best_table(condition: Condition, caption: str) -> Table:
    """Each arm's best rate, and its test accuracy there."""
    rows = [
        [
            label(name),
            f"{condition.chosen[name]:g}",
            percent(result.accuracy),
            "–" if result.gain is None else points(result.gain),
        ]
        for name, result in condition.results.items()
    ]
    return Table(["arm", "best rate", "test accuracy", "more than none, points"], rows, caption)


def growth_table(condition: Condition, caption: str) -> Table:
    """How many times the hidden weights grew at the best and the largest rate, and the rate that is left of it."""
    rows = []
    for name, growth in condition.growth.items():
        cells = []
        for rate in (condition.chosen[name], condition.limits[name].highest):
            grown = None if rate is None else growth.get(rate)
            cells.append("–" if rate is None else f"{rate:g}")
            cells.append("–" if grown is None else number(grown))
            free = rate is not None and grown is not None and name.split("_", 1)[1] in SCALE_FREE
            cells.append(number(rate / grown**2) if free and rate and grown else "–")
        rows.append([label(name), *cells])
    header = ["arm", "best rate", "growth", "rate / growth²", "largest rate", "growth", "rate / growth²"]
    return Table(header, rows, caption)


def goal_table(settings: LearningRatesSettings, summary: Summary, caption: str) -> Table:
    """Batch norm's largest rate against the baseline's, had a run to reach less to count as trained."""
    goals = sorted({goal for condition in summary.conditions.values() for goal in condition.at_goals})
    rows = []
    for goal in goals:
        cells = []
        for condition in summary.conditions.values():
            found = condition.at_goals.get(goal)
            cells.append(f"{factor(found)}: {verdict(found, settings.search_seeds)}" if found else "–")
        rows.append([f"{100 * goal:g} %", *cells])
    header = ["accuracy to reach", *(f"{ACTIVATIONS[activation][0]} units" for activation in summary.conditions)]
    return Table(header, rows, caption)


def _above(settings: LearningRatesSettings, condition: Condition, activation: str) -> str:
    """Accuracy of the baseline and of batch norm at the next rates above the baseline's best."""
    names = arm(activation, BASELINE), arm(activation, "batch_norm")
    own = condition.chosen[names[0]]
    steps = [rate for rate in sorted(settings.rates) if rate > own][:4]
    if not steps:
        return "none: the baseline's best rate is the largest tried"
    parts = [
        f"{number(rate / own)} times: "
        + " and ".join(f"{100 * fmean(condition.scores[name][rate]):.1f} %" for name in names)
        for rate in steps
    ]
    return f"{ACTIVATIONS[activation][0]}, without and with – {'; '.join(parts)}"


def verdict_table(settings: LearningRatesSettings, summary: Summary, caption: str) -> Table:
    """The papers' statements, and what was found."""
    each = summary.conditions.items()

    def largest(mechanism: str) -> str:
        parts = []
        for activation, condition in each:
            found = condition.largest.get(arm(activation, mechanism))
            text = "not comparable" if found is None else f"{factor(found)}, {verdict(found, settings.search_seeds)}"
            parts.append(f"{ACTIVATIONS[activation][0]}: {text}")
        return "; ".join(parts)

    rows = [
        ["batch norm allows much higher learning rates", largest("batch_norm")],
        [
            "5 and 30 times the baseline's rate train with batch norm; without it, 5 times does not",
            "; ".join(_above(settings, condition, activation) for activation, condition in each),
        ],
        [
            "at the baseline's own rate batch norm is better already",
            "; ".join(f"{ACTIVATIONS[a][0]}: {at_baseline(settings, condition, a)}" for a, condition in each),
        ],
        [
            "larger weights lead to smaller gradients, which stabilizes their growth",
            "; ".join(f"{ACTIVATIONS[a][0]}, {growth_sentence(c, arm(a, 'batch_norm'))}" for a, c in each),
        ],
        ["weight norm makes training robust to the learning rate (Salimans & Kingma)", largest("weight_norm")],
    ]
    return Table(["the paper", "here"], rows, caption)


def _method(settings: LearningRatesSettings, summary: Summary) -> str:
    widths = ", ".join(map(str, settings.widths))
    rates = ", ".join(f"{rate:g}" for rate in sorted(settings.rates))
    momentum = settings.momentum
    return (
        f"Hidden layers of {widths} units, pixels from 0 to 1, batches of {settings.batch_size}, momentum "
        f"{momentum:g}, constant learning rates {rates}; in the end a steady gradient moves a weight "
        f"{1 / (1 - momentum):.3g} times as far a step as the rate says. ReLU networks start as He et al. say, sigmoid "
        f"networks from Gaussian weights of standard deviation {settings.weight_std:g}; arms share the first weights "
        "(but weight standardization takes their mean away) and the order of images. A mechanism acts on the hidden "
        "layers; weight norm and weight standardization on the last layer too, and they start with the gains that "
        "belong to the first weights, not from data. Ghost batches have 25 images; whitening is ZCA in groups of 16 "
        "units; population batch norm normalizes by statistics of ten batches, without a gradient through them. "
        f"The search is the study: {settings.search_seeds} seeds for each arm and rate, on held-out training images. "
        "An arm trains from the smallest to the largest rate of its widest unbroken row of rates at which every seed "
        "trains. A limit lies between two neighbouring rates; the bounds of a ratio cover that and all pairs of seeds, "
        "and a difference is called clear if every seed of the one arm trains at a rate at which no seed of the other "
        f"does. The test accuracies are those of {settings.seeds} other seeds. " + open_ends(settings, summary)
    ).strip()


def _condition_blocks(
    settings: LearningRatesSettings, activation: str, condition: Condition, drawn: dict[str, str]
) -> list[Block]:
    kind = ACTIVATIONS[activation][0]
    goal = f"{100 * settings.goal:g} %"
    return [
        FigureBlock(
            drawn[f"{activation}-ranges"],
            f"Learning rates at which every seed reaches {goal}, {kind} units; the dot is the best rate, "
            "without a bar where no rate does. Blue: the length of the hidden weights has no influence on the "
            "output; orange: it has.",
        ),
        range_table(
            settings,
            condition,
            f"Learning rates at which every seed reaches {goal} of held-out images, {kind} units. In brackets: bounds "
            "that cover the distance between two rates tried, and all seeds; clear is what holds for every pair of "
            "seeds.",
        ),
        accuracy_table(
            settings,
            condition,
            f"Held-out images recognized, in per cent, by learning rate, {kind} units: means over "
            f"{settings.search_seeds} seeds of the last fifth of {settings.search_steps:,} steps; a run that diverged "
            "counts as guessing. Rates further out train no arm.",
        ),
        best_table(
            condition,
            f"Test accuracy at each arm's best rate, {kind} units: {settings.steps:,} steps, {settings.seeds} other "
            "seeds, paired differences; 95 % intervals.",
        ),
    ]


def build_page(finished: Finished, summary: Summary, command: str, drawn: dict[str, str]) -> Page:
    """Put the report together; `drawn` are the figures."""
    settings: LearningRatesSettings = finished.settings
    environment = next(iter(finished.records.values())).environment
    first = settings.activations[0]
    band = (
        "One run each."
        if settings.search_seeds == 1
        else (f"Lines are means of {settings.search_seeds} seeds, bands go from the worst to the best of them.")
    )
    sections = []
    for activation, condition in summary.conditions.items():
        blocks = _condition_blocks(settings, activation, condition, drawn)
        if activation != first:
            caption = f"The same with {ACTIVATIONS[activation][0]} units. {band}"
            blocks = [FigureBlock(drawn[f"{activation}-accuracy"], caption), *blocks]
        sections.append(Section(f"{ACTIVATIONS[activation][0]} units", blocks))
    growth: list[Block] = [
        Paragraph(
            "Where a normalization follows, or the weight is a direction with a gain, the length of the weight does "
            "not change the output, and gradients fall as it grows: a step of a given rate turns a weight that has "
            "become g times as long only like a step of rate / g² at the start. The tables show how far that "
            "goes; no run here holds the lengths fixed, so that it remains a reading of the ranges, not a proof."
        )
    ]
    growth += [
        FigureBlock(
            drawn[f"{first}-growth"],
            f"How many times as long as at the start the hidden weights end, by learning rate, {ACTIVATIONS[first][0]} "
            "units; lines stop at each arm's largest rate that trains.",
        )
    ]
    growth += [
        growth_table(
            condition,
            f"Growth of the hidden weights at each arm's best and largest rate, {ACTIVATIONS[activation][0]} units, "
            "and the rate divided by its square, where length is without influence.",
        )
        for activation, condition in summary.conditions.items()
    ]
    return Page(
        title="How large a learning rate can a network stand?",
        question=(
            "Batch normalization is said to allow much larger learning rates. How much larger, is it the statistics of "
            "the batch that do it, and do factored weights do the same?"
        ),
        answer=answer(settings, summary),
        hero=FigureBlock(
            drawn[f"{first}-accuracy"],
            f"Share of held-out images recognized after {settings.search_steps:,} steps, by learning rate, "
            f"{ACTIVATIONS[first][0]} units. {band} The dotted line is where a run counts as trained.",
        ),
        sections=[
            *sections,
            Section(
                "Does it depend on the accuracy to reach?",
                [
                    goal_table(
                        settings,
                        summary,
                        "Batch norm's largest rate against that without a mechanism, if a run counts as trained with "
                        "less. The smallest rates depend on the number of steps, too.",
                    )
                ],
            ),
            Section("A reason: weights grow, and steps turn them less", growth),
            Section(
                "Next to the papers",
                [verdict_table(settings, summary, "What the papers say, and what was found here, on a small network.")],
            ),
            method_section(_method(settings, summary), command),
        ],
        footer=footer(f"Data: {finished.data['description']}", environment, SOURCES),
    )
