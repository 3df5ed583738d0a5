"""The paper's MNIST experiment: does batch normalization train faster? (Ioffe & Szegedy 2015, section 4.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from rich.console import Console

from batchlab.lab.claims import Told
from batchlab.lab.files import read_json
from batchlab.lab.records import RunRecord, read_record
from batchlab.lab.studies.bn_mnist.answer import answer
from batchlab.lab.studies.bn_mnist.claims import claims
from batchlab.lab.studies.bn_mnist.mistakes import MISTAKES_FILE, save_mistakes
from batchlab.lab.studies.bn_mnist.page import build_page, figures, steps_table
from batchlab.lab.studies.bn_mnist.plan import arms, final_pairs
from batchlab.lab.studies.bn_mnist.settings import SIZES, BnMnistSettings
from batchlab.lab.studies.bn_mnist.summary import summarize
from batchlab.lab.studies.ending import command_for
from batchlab.lab.studies.search import choose_rates, final_plan, search_plan
from batchlab.lab.studies.stages import complete, to_json, told_title, write_report
from batchlab.lab.study import Outcome, Study, Workplace, open_folder, read_study

__all__ = ["STUDY", "read_finished"]

NAME: Final = "bn-mnist"


def read_finished(folder: Path) -> tuple[BnMnistSettings, dict[str, Any], dict[str, RunRecord]]:
    """Settings, what is known of the data, and the records of all runs of a finished study."""
    settings, data = read_study(folder, BnMnistSettings)
    plan = search_plan(settings, arms(settings), int(data["training_images"]))
    search = {name: read_record(folder / name) for name in plan}
    chosen, _ = choose_rates(settings, settings.arms, search)
    final = final_plan(settings, arms(settings), final_pairs(chosen))
    return settings, data, search | {name: read_record(folder / name) for name in final}


def run(settings: BnMnistSettings, workplace: Workplace) -> Path:
    """Search the rates, run the comparison, write the report; returns the report's path."""
    folder, dataset, console = workplace.folder, workplace.dataset, workplace.console
    # Settings that no run can have are refused here, before there is a folder.
    runs = arms(settings)
    plan = search_plan(settings, runs, len(dataset.train_images))
    final_plan(settings, runs, ((name, settings.rates[0]) for name in runs))
    with open_folder(folder, STUDY, settings, dataset):
        search = complete(workplace, plan, "1/2 choosing learning rates")
        chosen, scores = choose_rates(settings, runs, search)
        final = complete(workplace, final_plan(settings, runs, final_pairs(chosen)), "2/2 training             ")
        records = search | final
        summary = summarize(settings, records, chosen, scores)
        save_mistakes(folder, summary.best_run, records[summary.best_run], dataset)
        return report(folder, console)


def read(folder: Path) -> Outcome:
    """What the records in `folder` say.

    Raises:
        ValueError: the study in the folder is not finished, or a record is damaged.
    """
    settings, data, records = read_finished(folder)
    chosen, scores = choose_rates(settings, settings.arms, records)
    summary = summarize(settings, records, chosen, scores)
    if not (folder / MISTAKES_FILE).is_file():
        raise ValueError(f"{folder / MISTAKES_FILE} is missing: run the study again to finish it")
    mistakes = read_json(folder / MISTAKES_FILE)
    drawn = figures(settings, records, summary)
    command = command_for(NAME, settings, SIZES)
    page = build_page(settings, data, records, summary, mistakes, command, drawn)
    title = "Steps to a test accuracy, each arm at its own best rate"
    table = steps_table(summary.comparisons["own"], "")
    told = Told(NAME, told_title(settings, data), command, claims(summary))
    return Outcome(to_json(summary), drawn, page, title, table, answer(settings, summary.comparisons), told)


def report(folder: Path, console: Console) -> Path:
    """Write summary.json, the figures and report.html from the records in `folder`."""
    return write_report(read, folder, console)


STUDY: Final = Study(
    name=NAME,
    question="Does batch normalization train faster? The paper's MNIST network, with and without, each at its best.",
    settings=BnMnistSettings,
    sizes=SIZES,
    run=run,
    read=read,
    report=report,
)
