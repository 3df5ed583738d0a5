"""The report of the study bn-mnist: from summary, records and mistakes to a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchlab.lab.comparison import mean_curve
from batchlab.lab.figures import accuracy_curves, percentile_bands, rate_search
from batchlab.lab.records import RunRecord
from batchlab.lab.report import Block, FigureBlock, Gallery, Page, Paragraph, Picture, Section, Table
from batchlab.lab.studies.bn_mnist.answer import (
    answer,
    count,
    ending,
    mean_steps,
    percent,
    ratio_text,
    speed,
    target_name,
)
from batchlab.lab.studies.bn_mnist.settings import ARMS, BnMnistSettings
from batchlab.lab.studies.bn_mnist.summary import Comparison, Summary
from batchlab.lab.studies.search import arm_records

__all__ = ["build_page", "figures", "steps_table"]


def _steps_cell(values: tuple[int | None, ...]) -> str:
    reached = [value for value in values if value is not None]
    if not reached:
        return "never"
    text = count(mean_steps(values))
    return text if len(reached) == len(values) else f"{text} ({len(reached)} of {len(values)} runs)"


def steps_table(comparison: Comparison, caption: str) -> Table:
    """Steps to each target, without and with batch norm, and the ratio."""
    rows = [
        [
            target_name(row.target),
            _steps_cell(row.baseline),
            _steps_cell(row.other),
            "–" if row.ratio is None else ratio_text(row.ratio),
        ]
        for row in comparison.steps
    ]
    header = ["test accuracy", "steps without", "steps with", "times fewer"]
    return Table(header, rows, caption)


def _gap(comparison: Comparison) -> tuple[float, float, float, str] | None:
    row = comparison.headline
    if row is None or row.target is None or row.ratio is None or row.ratio.mean <= 1.1:
        return None
    return (
        row.target,
        mean_steps(row.other),
        mean_steps(row.baseline),
        f"{target_name(row.target)}: {row.ratio.mean:.1f}× fewer steps",
    )


def figures(settings: BnMnistSettings, records: Mapping[str, RunRecord], summary: Summary) -> dict[str, str]:
    """All figures of the study, by name, as SVG."""
    drawn: dict[str, str] = {}
    for name, comparison in summary.comparisons.items():
        arms = (comparison.baseline, comparison.other)
        curves = {ARMS[arm].label: mean_curve(arm_records(settings, records, arm, rate)) for arm, rate in arms}
        drawn[f"accuracy-{name}"] = accuracy_curves(
            f"accuracy-{name}",
            curves,
            gap=_gap(comparison),
            description="Test accuracy against training steps for " + " and ".join(curves),
        )
    bands = {}
    for arm, rate in (summary.comparisons["same"].baseline, summary.comparisons["same"].other):
        metrics = arm_records(settings, records, arm, rate)[0].metrics
        bands[ARMS[arm].label] = [line["step"] for line in metrics], [line["percentiles"][0] for line in metrics]
    drawn["percentiles"] = percentile_bands(
        "percentiles",
        bands,
        description="15th, 50th and 85th percentile of the input to one sigmoid of the last hidden layer over training",
    )
    drawn["rate-search"] = rate_search(
        "rate-search",
        {ARMS[arm].label: rates for arm, rates in summary.scores.items()},
        {ARMS[arm].label: rate for arm, rate in summary.chosen.items()},
        description="Validation accuracy against learning rate for each arm, the chosen rate ringed",
    )
    return drawn


def _seeds(settings: BnMnistSettings) -> str:
    if settings.seeds == 1:
        return "One run."
    return f"Lines are means over {settings.seeds} runs with different random starts, bands their 95 % intervals."


def _inference(summary: Summary) -> list[Block]:
    labels = {
        "running_average": "running averages, as training left them",
        "recalibrated": "recalibrated: population statistics (Algorithm 2)",
        "folded": "folded: batch norm multiplied into the weights",
    }
    rows = [[labels[kind], percent(value)] for kind, value in summary.inference.items()]
    caption = (
        "Three ways to run the same trained weights without a batch. Running averages follow the weights with a delay; "
        "recalibration freezes the weights and averages over all training images; folding leaves a plain network with "
        f"no batch norm at all. No output of a folded network differs by more than {summary.folded_difference:.1g} "
        "from the recalibrated one."
    )
    return [Table(["the network at inference", "test accuracy"], rows, caption)] if rows else []


def _gallery(mistakes: dict[str, Any]) -> list[Block]:
    names = mistakes["class_names"]
    pictures = [
        Picture(
            item["png"],
            f"test image {item['index']}, labelled {names[item['label']]}",
            [
                f"label: {names[item['label']]}",
                *(
                    f"{names[guess]}: {100 * share:.0f} %"
                    for guess, share in zip(item["guesses"], item["probabilities"], strict=True)
                ),
            ],
        )
        for item in mistakes["mistakes"]
    ]
    caption = (
        f"The {len(pictures)} of {mistakes['images']:,} test images that the network with the highest test accuracy "
        "gets wrong, with its two best guesses; the most confident mistakes come first. The network sees each pixel as "
        "black or white only. Some of these are questionable for humans too: judge for yourself."
    )
    return [Gallery(pictures, caption)]


def _why(settings: BnMnistSettings, summary: Summary, drawn: dict[str, str]) -> Section:
    wander, rate = summary.wander, summary.comparisons["same"].baseline[1]
    caption = (
        "What arrives at one sigmoid of the last hidden layer (its first unit, chosen before any run) over training, "
        f"both at learning rate {rate:g}: the middle line is the median over images, the band holds the middle 70 % of "
        "them (15th to 85th percentile). A sigmoid is steep around 0 and flat beyond about ±4: a unit whose whole band "
        "lies out there says nearly the same for every image, and hardly learns. As in the paper, the network is seen "
        f"as it trains: with statistics of batches of {settings.batch_size}."
    )
    text = (
        "The paper's explanation is that the distribution of each layer's inputs keeps shifting while the layers below "
        "learn. Over the whole of training, the median input of a unit in the last hidden layer moved through a range "
        f"of {wander['none'].mean:.1f} without batch norm and {wander['same'].mean:.1f} with it at the same rate"
        + (f", {wander['own'].mean:.1f} at its own best rate" if wander["own"] != wander["same"] else "")
        + f" (means over the first units of the layer and {settings.seeds} "
        + f"{'seed' if settings.seeds == 1 else 'seeds'})."
    )
    return Section("What happens inside", [FigureBlock(drawn["percentiles"], caption), Paragraph(text)])


def _fairness(settings: BnMnistSettings, summary: Summary, drawn: dict[str, str]) -> list[Section]:
    same = summary.comparisons["same"]
    rate = same.baseline[1]
    blocks: list[Block] = [
        Paragraph(
            "A method can win because its rate was chosen with more care. So each arm's rate was chosen in the same "
            "way, from the same rates, on images held out from the training set; the test images had no part in it. "
            "The second question is what happens when both arms get the rate that is best without batch norm."
        ),
        FigureBlock(
            drawn["rate-search"],
            f"The search: accuracy on held-out training images after {settings.search_steps:,} steps (mean over the "
            "last fifth of them), for each learning rate. Dots are runs, rings the chosen rates. A wide plateau means "
            "that the rate hardly matters.",
        ),
    ]
    if same == summary.comparisons["own"]:
        blocks.append(
            Paragraph(
                f"Here both arms turned out best at the same rate, {rate:g}: the comparison above already is the one "
                "at the same rate."
            )
        )
    else:
        blocks += [
            FigureBlock(
                drawn["accuracy-same"],
                f"Both arms at learning rate {rate:g}, the best without batch norm. {_seeds(settings)}",
            ),
            steps_table(same, f"Training steps to a test accuracy, both arms at learning rate {rate:g}."),
        ]
    sections = [Section("Is it only the learning rate?", blocks)]
    scaled = summary.comparisons.get("well_scaled")
    if scaled is not None:
        sections.append(
            Section(
                "Is it only the start?",
                [
                    Paragraph(
                        f'The paper starts from "small random Gaussian values"; here their standard deviation is '
                        f"{settings.weight_std:g}. Such a start leaves the plain network on a plateau at first. This "
                        f"control starts both arms at {settings.well_scaled_std:g} instead, close to 1/√100 for 100 "
                        "inputs, where signals keep their size from layer to layer; rates were chosen again. "
                        "What is left of the difference here is not owed to the start."
                    ),
                    FigureBlock(
                        drawn["accuracy-well_scaled"],
                        f"Test accuracy from a well-scaled start (standard deviation {settings.well_scaled_std:g}), "
                        f"each arm at its own best rate. {_seeds(settings)}",
                    ),
                    steps_table(scaled, "Training steps to a test accuracy from a well-scaled start."),
                    Paragraph(f"{speed(settings, scaled.headline)} {ending(settings, scaled)}."),
                ],
            )
        )
    return sections


def _method(settings: BnMnistSettings, summary: Summary, command: str) -> Section:
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    chosen = "; ".join(f"{ARMS[arm].label}: {rate:g}" for arm, rate in summary.chosen.items())
    without, normalized = summary.seconds_per_step["none"], summary.seconds_per_step["batch_norm"]
    cost = ""
    if without and normalized:
        cost = (
            f" A training step with batch norm took {normalized / without:.1f} times as long here ("
            f"{1e6 * normalized:.0f} against {1e6 * without:.0f} microseconds): on a network this "
            "small the cost is that of calling operations, not of arithmetic."
        )
    return Section(
        "How it was done",
        [
            Paragraph(
                f"The network of section 4.1 of the paper: 784 binary pixels, {len(settings.widths)} hidden layers of "
                f"{' and '.join(map(str, sorted(set(settings.widths))))} sigmoid units, 10 outputs, cross-entropy, "
                f"{settings.steps:,} steps of {settings.batch_size} images. With batch norm, each hidden layer "
                "normalizes its pre-activation over the batch, scales and shifts it, and then applies the sigmoid. "
                f"The paper states neither optimizer nor rate; here it is gradient descent with momentum "
                f"{settings.momentum:g} and a constant rate, chosen from {rates} ({chosen}), and weights that start "
                f"as Gaussians of standard deviation {settings.weight_std:g}. Pixels are 1 from half of the "
                f"brightness up. Both arms share seeds, and with them the first weights and the order of images; "
                f"ratios are taken seed by seed, and their mean is geometric. Steps are known to within "
                f"{100 * settings.spacing:g} %, the distance between evaluations.{cost}"
            ),
            Paragraph("To repeat it:"),
            Paragraph(command, code=True),
        ],
    )


def build_page(
    settings: BnMnistSettings,
    data: dict[str, Any],
    records: Mapping[str, RunRecord],
    summary: Summary,
    mistakes: dict[str, Any],
    command: str,
    drawn: dict[str, str],
) -> Page:
    """Put the report together; `drawn` are the `figures`."""
    own = summary.comparisons["own"]
    rates = f"{own.baseline[1]:g} without, {own.other[1]:g} with"
    some = next(iter(records.values()))
    environment = some.environment
    versions = f"batchlab {environment['batchlab']}" + (
        f" ({environment['commit']})" if environment.get("commit") else ""
    )
    caption = (
        "How well the network reads images it never trained on, over the course of training. One step shows it "
        f"{settings.batch_size} images. Each arm has its own best learning rate ({rates}). {_seeds(settings)} "
        "The scale (logit) is stretched towards 100 %: from 90 to 95 % is about as far as from 95 to 97.5 %, for each "
        "halves the errors."
    )
    return Page(
        title="Does batch normalization train faster?",
        question=(
            "A small network learns to read handwritten digits, with and without batch normalization: the MNIST "
            "experiment of Ioffe & Szegedy (2015), repeated with every choice made fairly."
            if settings.dataset == "mnist"
            else "A small network learns to tell pieces of clothing apart (Fashion-MNIST), with and without batch "
            "normalization: the MNIST experiment of Ioffe & Szegedy (2015) on other images."
        ),
        answer=answer(settings, summary.comparisons),
        hero=FigureBlock(drawn["accuracy-own"], caption),
        sections=[
            Section(
                "How many steps does it save?",
                [
                    steps_table(
                        own,
                        "Training steps until a test accuracy is first reached, each arm at its own best rate; means "
                        'over the runs that reached it, and ratios over the seeds where both did. "The best without" '
                        "is the highest accuracy that the run without batch norm ever had, for each seed its own. In "
                        "brackets: 95 % interval.",
                    ),
                    Table(
                        ["after the last step", "test accuracy"],
                        [
                            [ARMS["none"].label, percent(own.accuracy[0])],
                            [ARMS["batch_norm"].label, percent(own.accuracy[1])],
                        ],
                        f"Share of the test images recognized after {settings.steps:,} steps.",
                    ),
                ],
            ),
            _why(settings, summary, drawn),
            *_fairness(settings, summary, drawn),
            Section("What to use at inference", _inference(summary)),
            Section("What it still gets wrong", _gallery(mistakes)),
            _method(settings, summary, command),
        ],
        footer=[
            f"Data: {data['description']}.",
            f"{versions}, torch {environment['torch']}, Python {environment['python']}, {environment['processor']}, "
            "one thread a run.",
            "Ioffe & Szegedy, Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate "
            "Shift, 2015 (arXiv:1502.03167).",
        ],
    )
