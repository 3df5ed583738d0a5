"""The report of the study dropout-speed: from its points to figures, tables and a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchlab.lab.figures import Line, line_figure
from batchlab.lab.report import Block, FigureBlock, Page, Paragraph, Section, Table
from batchlab.lab.studies.dropout_speed.answer import answer, percent, percent_range, seconds_text, times
from batchlab.lab.studies.dropout_speed.measure import ARMS, Point
from batchlab.lab.studies.dropout_speed.settings import DropoutSpeedSettings
from batchlab.lab.studies.dropout_speed.summary import PAPER, Row, paper_row, saving
from batchlab.lab.studies.sections import DROPOUT_PAPER
from batchlab.lab.timing import Quartiles

__all__ = ["build_page", "figures", "speed_table", "verdict_table"]


def _batches(rows: Sequence[Row]) -> dict[int, list[Row]]:
    sizes = sorted({row.batch_size for row in rows})
    return {size: sorted((r for r in rows if r.batch_size == size), key=lambda row: row.width) for size in sizes}


def _line(rows: Sequence[Row], values: Sequence[Quartiles], dashed: bool = False) -> Line:
    return Line(
        [row.width for row in rows],
        [value.median for value in values],
        [value.low for value in values],
        [value.high for value in values],
        dashed,
    )


def _seconds_figure(batch_size: int, rows: Sequence[Row]) -> str:
    lines = {label: _line(rows, [row.epoch[arm] for row in rows], dashed=arm == "small") for arm, label in ARMS.items()}
    work = [row.epoch["none"].median * row.work for row in rows]
    lines["share of arithmetic"] = Line([row.width for row in rows], work, dashed=True)
    return line_figure(
        f"dropout-speed-seconds-{batch_size}",
        lines,
        x_label=f"units in each hidden layer (batches of {batch_size:,})",
        y_label="seconds an epoch",
        log_x=True,
        log_y=True,
        x_ticks=[row.width for row in rows],
        description=f"Seconds of an epoch against hidden units, batches of {batch_size}, both axes logarithmic: "
        + ", ".join(lines),
    )


def _saving_figure(arm: str, rows: Sequence[Row]) -> str:
    groups = _batches(rows)
    lines = {
        f"batches of {size:,}": _line(group, [saving(row.times_faster[arm]) for row in group])
        for size, group in groups.items()
    }
    widest = max(groups.values(), key=len)
    lines["arithmetic spared"] = Line([row.width for row in widest], [1 - row.work for row in widest], dashed=True)
    lines["the paper, recalled"] = Line([PAPER["width"]], [PAPER[arm]])
    lowest = min(min(line.low or line.y) for line in lines.values())
    return line_figure(
        f"dropout-speed-saving-{arm}",
        lines,
        x_label="units in each hidden layer",
        y_label=f"time saved from {ARMS[arm]}",
        log_x=True,
        percent=True,
        x_ticks=[row.width for row in widest],
        limits=(min(0.0, lowest - 0.05), 1.0),
        description=f"Share of the time that batchwise dropout saves, compared with {ARMS[arm]}, against hidden units",
    )


def figures(rows: Sequence[Row]) -> dict[str, str]:
    """All figures of the study, by name, as SVG."""
    drawn = {f"saving-{arm}": _saving_figure(arm, rows) for arm in ("none", "independent")}
    return drawn | {f"seconds-batch{size}": _seconds_figure(size, group) for size, group in _batches(rows).items()}


def speed_table(rows: Sequence[Row], caption: str) -> Table:
    """Seconds an epoch of each arm, and what batchwise dropout saves."""
    header = ["units, batch", *ARMS.values(), "saved from none", "from independent", "times the small"]
    cells = [
        [
            f"{row.width:,}, {row.batch_size:,}",
            *(seconds_text(row.epoch[arm].median) for arm in ARMS),
            *(percent_range(saving(row.times_faster[arm])) for arm in ("none", "independent")),
            times(row.over_limit),
        ]
        for row in rows
    ]
    return Table(header, cells, caption)


def verdict_table(rows: Sequence[Row]) -> Table:
    """The paper's numbers, and the ones measured here."""
    row = paper_row(rows)
    best = max(rows, key=lambda row: row.times_faster["none"].median)
    limits = [row.over_limit.median for row in rows]
    point = f"{PAPER['width']} units, batch {PAPER['batch_size']}"

    def here(arm: str) -> str:
        return "not measured in this size" if row is None else percent_range(saving(row.times_faster[arm]))

    cells = [
        [f"time saved from no dropout: {point}", percent(PAPER["none"]), here("none")],
        [f"time saved from independent dropout: {point}", percent(PAPER["independent"]), here("independent")],
        [
            "most that is saved, from no dropout",
            f"below the bound of {percent(PAPER['bound'])}",
            f"{percent_range(saving(best.times_faster['none']))}, at {best.width:,} units, batch {best.batch_size:,}",
        ],
        [
            "time over that of a network of the kept units",
            "lines nearly overlap",
            f"{min(limits):.2f} to {max(limits):.2f}" if len(limits) > 1 else f"{limits[0]:.2f}",
        ],
    ]
    return Table(
        ["", "the paper (recalled)", "here"],
        cells,
        "In brackets: quartiles over rounds. The paper's numbers are quoted from memory and still to be checked "
        "against its text. They are for an NVIDIA GeForce GTX 780 and the authors' own code; these for one thread of a "
        f"processor. The bound of {percent(PAPER['bound'])} holds for products between two layers that drop half of "
        "their units; a first layer that drops less of its inputs spares less arithmetic, and memory traffic has a "
        "bound of its own.",
    )


def _method(settings: DropoutSpeedSettings, points: Sequence[Point], command: str) -> Section:
    steps = [point.steps_per_turn for point in points]
    number = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
    network = "-".join(["784", *(["n"] * settings.hidden_layers), "10"])
    return Section(
        "How it was done",
        [
            Paragraph(
                f"Networks {network} with ReLUs, {settings.input_rate:g} of the inputs and {settings.rate:g} of the "
                f"hidden units dropped; whole training steps (zero the gradients, forward, cross-entropy, backward, "
                f"update with momentum 0.9) on one thread. No dropout, independent dropout (torch's) and the small "
                f"network are trained by torch's SGD in its fastest form (fused); batchwise dropout runs on "
                f"submatrices and is trained by SubmatrixSGD. The four take turns: {settings.rounds} rounds, in each "
                f"of which every network trains for {number} steps; who begins changes from round to round. Ratios are "
                f"taken within a round, then their median and quartiles over rounds, so that what slows down a round "
                f"slows down both. Two warm-up steps and one to choose the length of a turn are not counted."
            ),
            Paragraph(
                f"No epoch was run to its end: seconds an epoch are the time of a step, times the steps of "
                f"{settings.epoch_images:,} images. Reading and shuffling images is not included."
            ),
            Paragraph("To repeat it:"),
            Paragraph(command, code=True),
        ],
    )


def _seconds_blocks(settings: DropoutSpeedSettings, rows: Sequence[Row], drawn: dict[str, str]) -> list[Block]:
    blocks: list[Block] = [
        FigureBlock(
            drawn[f"seconds-batch{size}"],
            f"Batches of {size:,}: training time for {settings.epoch_images:,} images, extrapolated from some steps; "
            "both axes are logarithmic. The small network is a dense one of just the units that dropout keeps: the "
            "least that can be hoped for. The other dashed line is the time without dropout, times the share of the "
            "arithmetic that is left.",
        )
        for size in _batches(rows)
    ]
    caption = (
        f"Seconds for {settings.epoch_images:,} images (medians), the share of the time that batchwise dropout saves, "
        f"and its time as a multiple of the small network's; in brackets: quartiles over {settings.rounds} rounds."
    )
    return [*blocks, speed_table(rows, caption)]


def build_page(
    settings: DropoutSpeedSettings,
    data: dict[str, Any],
    points: Sequence[Point],
    rows: Sequence[Row],
    command: str,
    drawn: dict[str, str],
) -> Page:
    """Put the report together; `drawn` are the `figures`."""
    environment = points[0].environment
    versions = f"batchlab {environment['batchlab']}" + (
        f" ({environment['commit']})" if environment.get("commit") else ""
    )
    return Page(
        title="How much training time does batchwise dropout save?",
        question=(
            "Dropout throws computed units away. With one pattern for a whole batch they need not be computed at all: "
            "Figure 1 of Graham, Reizenstein & Robinson (2015), on this machine."
        ),
        answer=answer(settings, rows),
        hero=FigureBlock(
            drawn["saving-none"],
            "The share of the training time that batchwise dropout saves, compared with the same network without "
            "dropout; bands hold the middle half of the rounds. Dashed: the share of the arithmetic that falls away, "
            "what one would save if nothing else took time. The single mark is the paper's number, as recalled, for "
            "batches of 100 on a graphics processor of 2013.",
        ),
        sections=[
            Section("Seconds an epoch", _seconds_blocks(settings, rows, drawn)),
            Section(
                "Compared with independent dropout",
                [
                    FigureBlock(
                        drawn["saving-independent"],
                        "The same, compared with independent dropout, which draws a number for each unit of each "
                        "image: what changes for somebody who uses dropout already.",
                    )
                ],
            ),
            Section("Next to the paper", [verdict_table(rows)]),
            _method(settings, points, command),
        ],
        footer=[
            f"Inputs: {data['description']}.",
            f"{versions}, torch {environment['torch']}, Python {environment['python']}, {environment['processor']} "
            f"({environment['vector_instructions']}), one thread.",
            DROPOUT_PAPER,
        ],
    )
