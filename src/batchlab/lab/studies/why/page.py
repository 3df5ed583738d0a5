"""The report of the study why."""

from __future__ import annotations

from collections.abc import Mapping

from batchlab.lab.report import Block, FigureBlock, Page, Section, Table
from batchlab.lab.studies.arm_results import accuracy_table, steps_table
from batchlab.lab.studies.comparison_study import Finished
from batchlab.lab.studies.sections import footer, method_section, rate_section
from batchlab.lab.studies.why.answer import answer, number, ratio_text, verdict_table
from batchlab.lab.studies.why.measures import MEASURES
from batchlab.lab.studies.why.settings import ARMS, NETWORKS, NORMALIZATIONS, WhySettings
from batchlab.lab.studies.why.summary import Measured, Summary

__all__ = ["build_page", "layer_table", "measure_table", "time_table"]

SOURCES = (
    "Santurkar, Tsipras, Ilyas & Madry 2018, How Does Batch Normalization Help Optimization? (arXiv:1805.11604); "
    "Ioffe & Szegedy 2015, Batch Normalization (arXiv:1502.03167)."
)
SHIFT = "how far a step of the layers in front changes a layer's gradient, relative to it"
CHANGE = "how far the gradient changes along itself, bands from a half to four times the gradient step"
OVER_TIME = ("relative_shift", "shift", "moved", "relative_shift_anew", "change", "relative_change", "smoothness")


def _mean(found: Measured | None) -> str:
    return "–" if found is None else number(found.mean)


def _ratio(found: Measured | None) -> str:
    return "–" if found is None else ratio_text(found.ratio)


def measure_table(summary: Summary, network: str, rates: str, caption: str) -> Table:
    """Every measure at the same training loss: the three arms, and the ratios to no normalization."""
    part = summary.parts[network][rates]["same loss"]
    rows = []
    for measure, label in MEASURES.items():
        none, norm, noisy = (part[name].get(measure) for name in NORMALIZATIONS)
        rows.append([label, _mean(none), _mean(norm), _ratio(norm), _mean(noisy), _ratio(noisy)])
    return Table(["measure", "none", "batch norm", "times none", "noisy batch norm", "times none"], rows, caption)


def time_table(summary: Summary, network: str, rates: str, caption: str) -> Table:
    """Ratios to no normalization over training."""
    parts = summary.parts[network][rates]
    rows = [
        [
            MEASURES[measure],
            *(
                _ratio(parts[window][name].get(measure))
                for name in ("batch_norm", "noisy_batch_norm")
                for window in ("start", "early", "late")
            ),
        ]
        for measure in OVER_TIME
    ]
    header = [
        "measure",
        *(f"{name}, {window}" for name in ("batch norm", "noisy") for window in ("start", "early", "late")),
    ]
    return Table(header, rows, caption)


def layer_table(summary: Summary, network: str, caption: str) -> Table:
    """The relative gradient shift of each layer but the first, over the same without normalization."""
    found = summary.layers[network]
    rows = [
        [f"layer {place}", ratio_text(norm), ratio_text(noisy)]
        for place, (norm, noisy) in enumerate(zip(found["batch_norm"], found["noisy_batch_norm"], strict=True), 2)
    ]
    return Table(["", "batch norm, times none", "noisy batch norm, times none"], rows, caption)


def _method(settings: WhySettings, data_images: int) -> str:
    def units(widths: tuple[int, ...]) -> str:
        return "-".join(map(str, widths))

    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    high, low = settings.losses
    epochs = settings.steps * settings.batch_size / data_images
    return (
        f"Two multilayer perceptrons on pixels from 0 to 1: {units(settings.widths)} sigmoid units that start from "
        f"Gaussian weights of standard deviation {settings.weight_std:g}, and {units(settings.relu_widths)} ReLU "
        f"units that start as He et al. say. Normalization is in front of each nonlinearity. {settings.steps:,} "
        f"steps of {settings.batch_size} images ({number(epochs)} epochs), momentum {settings.momentum:g}, a "
        f"constant rate chosen for each arm from {rates} on held-out training images. Measurements are made after "
        f"steps spaced {100 * settings.spacing:g} % apart, on the batch that training takes next, which is the same "
        "in all arms; in training mode, with running statistics at rest, and on copies: training is the same to "
        "the last bit as without them. Gradient shift: G is the gradient for a layer's weight; G' the same, on the "
        "same batch, with all parameters in front of that layer as the optimizer's actual next step, momentum "
        "included, leaves them. Its mean over layers 2 and up is geometric. A larger gradient shifts more, and "
        "with batch norm its size depends on the weights' size; so the shift is also given relative to G. Shift of "
        "the inputs' means: how far the step moves the batch's mean of what enters a layer, in root mean square "
        "over features, divided by their standard deviation. Along the gradient: at 7 points from a half to four "
        "times rate times gradient, without momentum. Noisy batch norm draws its noise once for both sides of a "
        "comparison, so that the noise does not count as shift or roughness; rows that say so use the noise of the "
        "next step on the changed side instead, as training meets it. Start: the first hundredth of "
        f"the steps; early: the first tenth; late: the second half; same loss: where the mean training loss since the "
        f"last measurement is between {high:g} and {low:g}, so that arms are compared where they have "
        "learned as much. Within a run means over measurements are geometric; ratios are taken seed by seed."
    )


def _network_section(network: str, summary: Summary, drawn: Mapping[str, str], settings: WhySettings) -> Section:
    high, low = settings.losses
    blocks: list[Block] = []
    if network != next(iter(NETWORKS)):
        blocks += [
            FigureBlock(drawn[f"shift-own-{network}"], f"Each arm at its own best rate: {SHIFT}."),
            FigureBlock(drawn[f"gradients-own-{network}"], f"Each arm at its own best rate: {CHANGE}."),
        ]
    blocks += [
        FigureBlock(
            drawn[f"smoothness-own-{network}"],
            "Effective smoothness along the gradient: the largest change of the gradient per distance. Lower is "
            "smoother. Each arm at its own best rate.",
        ),
        measure_table(
            summary,
            network,
            "own",
            f"Each arm at its own best rate, while the training loss is between {high:g} and {low:g}: geometric means, "
            "and how many times as much as without normalization, with 95 % intervals.",
        ),
        time_table(
            summary,
            network,
            "own",
            "How many times as much as without normalization, in the first hundredth, the first tenth and the second "
            "half of training.",
        ),
        layer_table(
            summary,
            network,
            "The relative gradient shift layer by layer, at own rates and the same training loss. The first layer has "
            "none in front of it, and no shift.",
        ),
    ]
    return Section(f"The {NETWORKS[network]}", blocks)


def _control_section(summary: Summary, drawn: Mapping[str, str]) -> Section:
    blocks: list[Block] = []
    for network, name in NETWORKS.items():
        rate = summary.chosen[f"{network}-none"]
        blocks += [
            FigureBlock(drawn[f"shift-common-{network}"], f"The {name}, all arms at {rate:g}: {SHIFT}."),
            FigureBlock(drawn[f"gradients-common-{network}"], f"The {name}, all arms at {rate:g}: {CHANGE}."),
            measure_table(
                summary,
                network,
                "common",
                f"The {name}, all at the rate {rate:g}, the best one without normalization; same training loss.",
            ),
        ]
    return Section("All at one rate", blocks)


def _edge_note(settings: WhySettings, summary: Summary) -> str:
    """Which arms chose the smallest or the largest rate, where the search is not closed."""
    edges = [ARMS[arm] for arm, rate in summary.chosen.items() if rate in (min(settings.rates), max(settings.rates))]
    return f" At the edge of what was tried, so a better rate may lie outside: {'; '.join(edges)}." if edges else ""


def build_page(finished: Finished, summary: Summary, command: str, drawn: dict[str, str]) -> Page:
    """Put the report together; `drawn` are the figures."""
    settings: WhySettings = finished.settings
    environment = next(iter(finished.records.values())).environment
    seeds = "One run each" if settings.seeds == 1 else f"Geometric means over {settings.seeds} runs"
    first = next(iter(NETWORKS))
    results = {arm: result for found in summary.results.values() for arm, result in found.items()}
    return Page(
        title="Does batch norm reduce internal covariate shift?",
        question=(
            "Batch normalization was made to hold steady what each layer gets while the layers in front of it learn. "
            "Does it do that at all, and if not, what does it do instead?"
        ),
        answer=answer(settings, summary),
        hero=FigureBlock(
            drawn[f"shift-own-{first}"] + drawn[f"gradients-own-{first}"],
            f"The {NETWORKS[first]}, each arm at its own best rate. Above: {SHIFT}; bands are 95 % intervals. Below: "
            f"{CHANGE}; narrow and low is predictable. {seeds}.",
        ),
        sections=[
            Section(
                "What the paper says, and what was found",
                [
                    verdict_table(
                        summary,
                        "Batch norm compared with no normalization at the same training loss, with 95 % intervals; "
                        "smaller means steadier.",
                    )
                ],
            ),
            *(_network_section(network, summary, drawn, settings) for network in NETWORKS),
            _control_section(summary, drawn),
            Section(
                "How they learned",
                [
                    FigureBlock(drawn["accuracy"], "Share of test images recognized, each arm at its own best rate."),
                    steps_table(
                        results,
                        ARMS,
                        "Training steps until a test accuracy is first reached, means over the runs that reached it; "
                        "how many times fewer than the same network without normalization.",
                    ),
                    accuracy_table(
                        results,
                        ARMS,
                        summary.chosen,
                        f"Test accuracy at the end of {settings.steps:,} steps; the baseline is the same network "
                        f"without normalization.{_edge_note(settings, summary)}",
                    ),
                ],
            ),
            rate_section(drawn["rate-search"], settings.search_steps),
            method_section(_method(settings, finished.training_images), command),
        ],
        footer=footer(f"Data: {finished.data['description']}", environment, SOURCES),
    )
