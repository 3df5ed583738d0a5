"""How patterns of batchwise dropout are drawn, and how many it takes (Graham et al. 2015, sections 2 and 3.1)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console

from batchlab.lab.records import read_record
from batchlab.lab.studies.dropout_patterns.page import answer, build_page, error_table, figures
from batchlab.lab.studies.dropout_patterns.plan import choose_rates, final_plan, search_plan
from batchlab.lab.studies.dropout_patterns.settings import SIZES, DropoutPatternsSettings, arms
from batchlab.lab.studies.dropout_patterns.summary import summarize, to_json
from batchlab.lab.studies.ending import command_for, print_ending
from batchlab.lab.studies.stages import complete, write_outcome
from batchlab.lab.study import Study, Workplace, open_folder, read_study

__all__ = ["STUDY"]

NAME: Final = "dropout-patterns"


def run(settings: DropoutPatternsSettings, workplace: Workplace) -> Path:
    """Search the rates, run the comparison, write the report; returns the report's path."""
    folder, dataset, console = workplace.folder, workplace.dataset, workplace.console
    # Settings that no run can have are refused here, before there is a folder.
    plan = search_plan(settings, len(dataset.train_images))
    final_plan(settings, dict.fromkeys(arms(settings), settings.rates[0]))
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
    settings, data = read_study(folder, DropoutPatternsSettings)
    images = int(data["training_images"])
    with console.status("writing the report"):
        records = {name: read_record(folder / name) for name in search_plan(settings, images)}
        chosen, scores = choose_rates(settings, records)
        records |= {name: read_record(folder / name) for name in final_plan(settings, chosen)}
        summary = summarize(settings, records, chosen, scores)
        drawn = figures(settings, records, summary, images)
        # The data set is an option of its own, not part of a named size.
        sizes = {name: replace(size, dataset=settings.dataset) for name, size in SIZES.items()}
        page = build_page(settings, data, records, summary, command_for(NAME, settings, sizes), drawn)
        write_outcome(folder, to_json(summary), drawn, page)
    table = error_table(settings, summary, "")
    print_ending(console, "Test error, each arm at its own best rate", table, answer(settings, summary), folder)
    return folder / "report.html"


STUDY: Final = Study(
    name=NAME,
    question="How many different patterns does batchwise dropout need, and does it matter how they are drawn?",
    settings=DropoutPatternsSettings,
    sizes=SIZES,
    run=run,
    report=report,
)
