"""A study that compares arms: a learning rate for each from a search, then the same seeds in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from batchlab.lab.claims import Claim, Told
from batchlab.lab.records import RunRecord, read_record
from batchlab.lab.report import Page, Table
from batchlab.lab.settings import RunSettings
from batchlab.lab.studies.ending import command_for
from batchlab.lab.studies.search import Arms, Scores, arm_records, choose_rates, final_plan, search_plan
from batchlab.lab.studies.settings import ComparisonSettings
from batchlab.lab.studies.stages import complete, to_json, told_title, write_report
from batchlab.lab.study import Outcome, Study, Workplace, open_folder, read_study

__all__ = ["Comparison", "Finished", "comparison_study", "read_finished"]


@dataclass(frozen=True)
class Finished:
    """Everything that a finished study left.

    Args:
        settings: of the study.
        data: what study.json says of the images; `training_images` is how many there are.
        records: name of the run -> its record, those of the search included.
        chosen: each arm's best rate.
        scores: of the search.
    """

    settings: Any
    data: dict[str, Any]
    records: Mapping[str, RunRecord]
    chosen: dict[str, float]
    scores: Scores

    @property
    def training_images(self) -> int:
        """How many images the final runs train on."""
        return int(self.data["training_images"])

    def runs(self, arm: str, rate: float | None = None) -> list[RunRecord]:
        """The final runs of an arm at a rate, by seed; None: at its own best rate."""
        return arm_records(self.settings, self.records, arm, self.chosen[arm] if rate is None else rate)


def _no_more(_: Mapping[str, float]) -> Sequence[tuple[str, float]]:
    return ()


@dataclass(frozen=True)
class Comparison:
    """What is a study's own.

    Args:
        name: on the command line.
        question: one line.
        settings: the dataclass of its settings.
        sizes: named settings.
        arms: settings -> each arm's run.
        summarize: everything that report and README quote, as a dataclass.
        figures: name -> SVG.
        build_page: the report, from the summary, the command that repeats the study, and the figures.
        ending: title, table and sentences for the console.
        claims: the numbers of the answer, to compare with the same study done again.
        also: chosen rates -> further pairs of an arm and a rate that it is trained at.
    """

    name: str
    question: str
    settings: type[ComparisonSettings]
    sizes: Mapping[str, Any]
    arms: Callable[[Any], Arms]
    summarize: Callable[[Finished], Any]
    figures: Callable[[Finished, Any], dict[str, str]]
    build_page: Callable[[Finished, Any, str, dict[str, str]], Page]
    ending: Callable[[Finished, Any], tuple[str, Table, Sequence[str]]]
    claims: Callable[[Finished, Any], Sequence[Claim]]
    also: Callable[[Mapping[str, float]], Sequence[tuple[str, float]]] = _no_more

    def final_plan(self, settings: Any, chosen: Mapping[str, float]) -> dict[str, RunSettings]:
        """The final runs, given the chosen rates."""
        return final_plan(settings, self.arms(settings), [*chosen.items(), *self.also(chosen)])


def read_finished(comparison: Comparison, folder: Path) -> Finished:
    """Read a study's folder.

    Raises:
        ValueError: the study is not finished, or a record is damaged.
    """
    settings, data = read_study(folder, comparison.settings)
    arms = comparison.arms(settings)
    plan = search_plan(settings, arms, int(data["training_images"]))
    records = {name: read_record(folder / name) for name in plan}
    chosen, scores = choose_rates(settings, arms, records)
    records |= {name: read_record(folder / name) for name in comparison.final_plan(settings, chosen)}
    return Finished(settings, data, records, chosen, scores)


def comparison_study(comparison: Comparison) -> Study:
    """Make a study of it: `run` does what is missing, `report` writes the report from the records."""

    def run(settings: ComparisonSettings, workplace: Workplace) -> Path:
        # Settings that no run can have are refused here, before there is a folder.
        arms = comparison.arms(settings)
        plan = search_plan(settings, arms, len(workplace.dataset.train_images))
        final_plan(settings, arms, ((name, settings.rates_of(name)[0]) for name in arms))
        with open_folder(workplace.folder, study, settings, workplace.dataset):
            search = complete(workplace, plan, "1/2 choosing learning rates")
            chosen, _ = choose_rates(settings, arms, search)
            complete(workplace, comparison.final_plan(settings, chosen), "2/2 training             ")
            return report(workplace.folder, workplace.console)

    def read(folder: Path) -> Outcome:
        finished = read_finished(comparison, folder)
        summary = comparison.summarize(finished)
        drawn = comparison.figures(finished, summary)
        command = command_for(comparison.name, finished.settings, comparison.sizes)
        page = comparison.build_page(finished, summary, command, drawn)
        title = told_title(finished.settings, finished.data)
        told = Told(comparison.name, title, command, comparison.claims(finished, summary))
        return Outcome(to_json(summary), drawn, page, *comparison.ending(finished, summary), told)

    def report(folder: Path, console: Console) -> Path:
        return write_report(read, folder, console)

    study = Study(
        name=comparison.name,
        question=comparison.question,
        settings=comparison.settings,
        sizes=comparison.sizes,
        run=run,
        read=read,
        report=report,
    )
    return study
