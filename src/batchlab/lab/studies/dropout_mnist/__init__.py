"""A large network with dropout against a small one, and two kinds of dropout (Graham et al. 2015, section 1)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console

from batchlab.lab.records import read_record
from batchlab.lab.studies.dropout_mnist.answer import answer
from batchlab.lab.studies.dropout_mnist.page import build_page, error_table, figures
from batchlab.lab.studies.dropout_mnist.plan import choose_rates, final_plan, search_plan
from batchlab.lab.studies.dropout_mnist.settings import ARMS, SIZES, DropoutMnistSettings
from batchlab.lab.studies.dropout_mnist.summary import summarize, to_json
from batchlab.lab.studies.ending import command_for, print_ending
from batchlab.lab.studies.stages import complete, write_outcome
from batchlab.lab.study import Study, Workplace, open_folder, read_study

__all__ = ["STUDY"]

NAME: Final = "dropout-mnist"


def run(settings: DropoutMnistSettings, workplace: Workplace) -> Path:
    """Search the rates, run the comparison, write the report; returns the report's path."""
    folder, dataset, console = workplace.folder, workplace.dataset, workplace.console
    # Settings that no run can have are refused here, before there is a folder.
    plan = search_plan(settings, len(dataset.train_images))
    final_plan(settings, dict.fromkeys(ARMS, settings.rates[0]))
    with open_folder(folder, STUDY, settings, dataset):
        search = complete(workplace, plan, "1/2 choosing learning rates")
        chosen, _ = choose_rates(settings, search)
        complete(workplace, final_plan(settings, chosen), "2/2 training             ")
        return report(folder, console)


def report(folder: Path, console: Console) -> Path:
    """Write summary.json, the figures and report.html from the records in `folder`.

    Raises:
        ValueError: the study in the folder is not finished, or a record is damaged.
    """
    settings, data = read_study(folder, DropoutMnistSettings)
    images = int(data["training_images"])
    with console.status("writing the report"):
        records = {name: read_record(folder / name) for name in search_plan(settings, images)}
        chosen, scores = choose_rates(settings, records)
        records |= {name: read_record(folder / name) for name in final_plan(settings, chosen)}
        summary = summarize(settings, records, chosen, scores, images)
        drawn = figures(settings, records, summary, images)
        # What the data set decides is left out of the comparison with the named sizes.
        sizes = {
            name: replace(size, dataset=settings.dataset, targets=settings.targets) for name, size in SIZES.items()
        }
        page = build_page(settings, data, records, summary, command_for(NAME, settings, sizes), drawn)
        write_outcome(folder, to_json(summary), drawn, page)
    table = error_table(summary, "")
    print_ending(console, "Test error, each arm at its own best rate", table, answer(settings, summary), folder)
    return folder / "report.html"


STUDY: Final = Study(
    name=NAME,
    question="Does dropout that never computes what it drops learn as well? 2 x 80 and 2 x 800 units on MNIST.",
    settings=DropoutMnistSettings,
    sizes=SIZES,
    run=run,
    report=report,
)
