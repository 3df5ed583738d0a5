"""The paper's MNIST experiment: does batch normalization train faster? (Ioffe & Szegedy 2015, section 4.1)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from batchlab.lab.files import read_json
from batchlab.lab.records import RunRecord, read_record
from batchlab.lab.studies.bn_mnist.answer import answer
from batchlab.lab.studies.bn_mnist.mistakes import MISTAKES_FILE, save_mistakes
from batchlab.lab.studies.bn_mnist.page import build_page, figures, steps_table
from batchlab.lab.studies.bn_mnist.plan import choose_rates, final_plan, search_plan
from batchlab.lab.studies.bn_mnist.settings import SIZES, BnMnistSettings
from batchlab.lab.studies.bn_mnist.summary import Summary, summarize, to_json
from batchlab.lab.studies.stages import complete, write_outcome
from batchlab.lab.study import Study, Workplace, open_folder, read_study

__all__ = ["STUDY"]

NAME: Final = "bn-mnist"


def _records(folder: Path, settings: BnMnistSettings, training_images: int) -> dict[str, RunRecord]:
    """Records of all runs of a finished study."""
    search = {name: read_record(folder / name) for name in search_plan(settings, training_images)}
    chosen, _ = choose_rates(settings, search)
    return search | {name: read_record(folder / name) for name in final_plan(settings, chosen)}


def _command(settings: BnMnistSettings) -> str:
    """The words that start this study again."""

    def with_its_options(size: BnMnistSettings) -> BnMnistSettings:
        return replace(size, dataset=settings.dataset, seeds=settings.seeds, targets=settings.targets)

    size = next((name for name, size in SIZES.items() if with_its_options(size) == settings), None)
    if size is None:
        return "batchlab study bn-mnist --settings SETTINGS.toml   # the settings are in study.json"
    options = {"--size": (size, "full"), "--seeds": (settings.seeds, SIZES[size].seeds)}
    options["--dataset"] = (settings.dataset, "mnist")
    words = [f"{name} {value}" for name, (value, default) in options.items() if value != default]
    return " ".join(["batchlab study bn-mnist", *words])


def _print_summary(settings: BnMnistSettings, summary: Summary, page: Path, console: Console) -> None:
    own = summary.comparisons["own"]
    content = steps_table(own, "")
    table = Table(title="Steps to a test accuracy, each arm at its own best rate")
    for index, name in enumerate(content.header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in content.rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    for sentence in answer(settings, summary.comparisons):
        console.print(sentence, highlight=False)
    console.print()
    console.print("The report, with all figures:", highlight=False)
    console.print(f"  {page.resolve()}", style="bold", highlight=False, soft_wrap=True)


def run(settings: BnMnistSettings, workplace: Workplace) -> Path:
    """Search the rates, run the comparison, write the report; returns the report's path."""
    folder, dataset, console = workplace.folder, workplace.dataset, workplace.console
    # Settings that no run can have are refused here, before there is a folder.
    plan = search_plan(settings, len(dataset.train_images))
    final_plan(settings, dict.fromkeys(settings.arms, settings.rates[0]))
    with open_folder(folder, STUDY, settings, dataset):
        search = complete(workplace, plan, "1/2 choosing learning rates")
        chosen, scores = choose_rates(settings, search)
        records = search | complete(workplace, final_plan(settings, chosen), "2/2 training             ")
        summary = summarize(settings, records, chosen, scores)
        save_mistakes(folder, summary.best_run, records[summary.best_run], dataset)
        return report(folder, console)


def report(folder: Path, console: Console) -> Path:
    """Write summary.json, the figures and report.html from the records in `folder`.

    Raises:
        ValueError: the study in the folder is not finished, or a record is damaged.
    """
    settings, data = read_study(folder, BnMnistSettings)
    training_images = int(data["training_images"])
    with console.status("writing the report"):
        records = _records(folder, settings, training_images)
        chosen, scores = choose_rates(settings, records)
        summary = summarize(settings, records, chosen, scores)
        if not (folder / MISTAKES_FILE).is_file():
            raise ValueError(f"{folder / MISTAKES_FILE} is missing: run the study again to finish it")
        mistakes = read_json(folder / MISTAKES_FILE)
        drawn = figures(settings, records, summary)
        page = build_page(settings, data, records, summary, mistakes, _command(settings), drawn)
        write_outcome(folder, to_json(summary), drawn, page)
    _print_summary(settings, summary, folder / "report.html", console)
    return folder / "report.html"


STUDY: Final = Study(
    name=NAME,
    question="Does batch normalization train faster? The paper's MNIST network, with and without, each at its best.",
    settings=BnMnistSettings,
    sizes=SIZES,
    run=run,
    report=report,
)
