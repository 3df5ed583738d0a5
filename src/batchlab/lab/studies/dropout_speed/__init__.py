"""The paper's Figure 1: how much training time does batchwise dropout save? (Graham, Reizenstein & Robinson 2015)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from batchlab.lab.data import Dataset
from batchlab.lab.studies.dropout_speed.answer import answer
from batchlab.lab.studies.dropout_speed.measure import (
    check_settings,
    expected_work,
    measure_point,
    plan,
    read_point,
    refuse_other_machines,
    write_point,
)
from batchlab.lab.studies.dropout_speed.page import build_page, figures, speed_table
from batchlab.lab.studies.dropout_speed.settings import SIZES, DropoutSpeedSettings
from batchlab.lab.studies.dropout_speed.summary import summarize, to_json
from batchlab.lab.studies.ending import command_for
from batchlab.lab.studies.stages import write_report
from batchlab.lab.study import Outcome, Study, Workplace, open_folder, read_study

__all__ = ["STUDY"]

NAME: Final = "dropout-speed"


def _measure_missing(settings: DropoutSpeedSettings, folder: Path, dataset: Dataset, console: Console) -> None:
    points = plan(settings)
    for leftover in (folder / "points").glob(".*.partial"):  # of a study that was killed while it wrote
        leftover.unlink()
    missing = {name: point for name, point in points.items() if not (folder / name).is_file()}
    if not missing:
        return
    refuse_other_machines(folder, [read_point(folder / name, settings) for name in points if name not in missing])
    # Drawn between rounds only: a thread that draws would take its time from what is measured.
    with Progress(
        TextColumn("measuring {task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
    ) as bar:
        work = {name: expected_work(settings, *point) for name, point in points.items()}
        done = sum(work[name] for name in points if name not in missing)
        task = bar.add_task("", total=sum(work.values()))
        bar.advance(task, done)

        def advance(amount: float) -> None:
            bar.advance(task, amount)
            bar.refresh()

        for name, (width, batch_size) in missing.items():
            bar.update(task, description=f"{width:,} units, batches of {batch_size:,}")
            bar.refresh()
            on_round = partial(advance, work[name] / settings.rounds)
            write_point(folder / name, measure_point(settings, dataset, width, batch_size, on_round))
        bar.update(task, description="is done")


def run(settings: DropoutSpeedSettings, workplace: Workplace) -> Path:
    """Measure the points that are missing, one after the other, and write the report; returns the report's path."""
    folder, dataset, console = workplace.folder, workplace.dataset, workplace.console
    check_settings(settings, dataset)
    if workplace.jobs not in (None, 1):
        console.print("Times are measured one after the other, whatever --jobs says.", highlight=False)
    with open_folder(folder, STUDY, settings, dataset):
        _measure_missing(settings, folder, dataset, console)
        return report(folder, console)


def read(folder: Path) -> Outcome:
    """What the measurements in `folder` say.

    Raises:
        ValueError: points are missing, or a file is damaged.
    """
    settings, data = read_study(folder, DropoutSpeedSettings)
    points = [read_point(folder / name, settings) for name in plan(settings)]
    rows = summarize(settings, points)
    drawn = figures(rows)
    page = build_page(settings, data, points, rows, command_for(NAME, settings, SIZES), drawn)
    title = f"Seconds for {settings.epoch_images:,} images, and what batchwise dropout saves"
    return Outcome(to_json(rows), drawn, page, title, speed_table(rows, ""), answer(settings, rows))


def report(folder: Path, console: Console) -> Path:
    """Write summary.json, the figures and report.html from the measurements in `folder`."""
    return write_report(read, folder, console)


STUDY: Final = Study(
    name=NAME,
    question="How much training time does batchwise dropout save? The paper's Figure 1, on this machine.",
    settings=DropoutSpeedSettings,
    sizes=SIZES,
    run=run,
    read=read,
    report=report,
)
