"""`batchlab study NAME`: run a study, or go on with one; `batchlab study all`: all of them, and one report."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import tyro
from rich.console import Console

from batchlab.cli.options import Count, File, Folder, Seed, choice, unhinted
from batchlab.lab.data import Dataset, load_dataset
from batchlab.lab.settings import SettingsError, read_settings
from batchlab.lab.studies import STUDIES
from batchlab.lab.studies.collection import collect
from batchlab.lab.study import Study, Workplace

__all__ = ["StudyCommand"]

ALL: Final = "all"
Size = Literal["full", "demo", "quick"]
Images = Literal["mnist", "fashion"]


@dataclass(frozen=True)
class StudyCommand:
    """Run a study and write its report. Interrupted, the same command goes on where it stopped."""

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
    """Which one; `batchlab studies` lists them. all: every one, and one report of them."""
    quick: Annotated[bool, unhinted] = False
    """The smallest size, within a minute; the same as --size quick."""
    size: Annotated[Size | None, choice(Size), unhinted] = None
    """full: as published; demo: about five minutes; quick: within one. Without it: full."""
    seeds: Count = None
    """Runs of each arm, with different random starts."""
    first_seed: Seed = None
    """The first of these starts, a whole number; without it 0. Another one repeats the study with other randomness."""
    dataset: Annotated[Images | None, choice(Images), unhinted] = None
    """mnist: handwritten digits (the default); fashion: Fashion-MNIST, pieces of clothing."""
    data: Folder = None
    """Folder with the IDX files. Without it: $BATCHLAB_DATA, the cache, the system's data sets, download, and at last \
the 5,000 digits that come with batchlab."""
    out: Folder = None
    """Folder for records and report; it can be continued. Without it: runs/NAME. For all: a folder of each is in it."""
    jobs: Count = None
    """Parallel processes, one thread each. Without it: one per core."""
    settings: File = None
    """TOML or JSON file with the study's settings, instead of a size."""

    def _settings(self, study: Study) -> Any:
        if self.settings is not None:
            for option, value in (("--quick", self.quick), ("--size", self.size)):
                if value:
                    raise SettingsError(f"--settings and {option} exclude each other: put the sizes into the file")
            settings = read_settings(self.settings, study.settings)
        else:
            if self.quick and self.size not in (None, "quick"):
                raise SettingsError(f"--quick and --size {self.size} contradict each other: pass one of them")
            settings = study.sizes["quick" if self.quick else self.size or "full"]
        known = {field.name for field in fields(study.settings)}
        asked = {"seeds": self.seeds, "first_seed": self.first_seed}
        changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        if self.dataset is not None and self.dataset != settings.dataset:
            changes["dataset"] = self.dataset
            if "targets" in known:
                changes["targets"] = ()  # they are the data set's
        foreign = [key for key in asked if key in changes and key not in known]
        if foreign and self.name != ALL:
            options = " and ".join(f"--{key.replace('_', '-')}" for key in foreign)
            raise SettingsError(f"the study {study.name} has no random starts to repeat: leave out {options}")
        return replace(settings, **{key: value for key, value in changes.items() if key not in foreign})

    def _folder(self) -> Path:
        size = "quick" if self.quick else self.size
        parts = [
            self.name,
            size if size != "full" else None,
            None if self.dataset in (None, "mnist") else self.dataset,
            None if not self.first_seed else f"from-seed-{self.first_seed}",
        ]
        return self.out or Path("runs") / "-".join(part for part in parts if part)

    def execute(self, console: Console, errors: Console) -> int:
        """Load the data, say which, run what is missing, write the report."""
        if self.name != ALL and self.name not in STUDIES:
            raise SettingsError(f"there is no study {self.name!r}; there are: {', '.join(STUDIES)}, and {ALL}")
        if self.name == ALL and self.settings is not None:
            raise SettingsError("--settings is for one study: name it, or leave out --settings")
        chosen = list(STUDIES.values()) if self.name == ALL else [STUDIES[self.name]]
        # Before the first one starts, so that a mistake does not wait for the last.
        settings = {study.name: self._settings(study) for study in chosen}
        folder = self._folder()
        dataset: Dataset | None = None
        for number, study in enumerate(chosen, 1):
            if dataset is None or dataset.name != settings[study.name].dataset:
                dataset = load_dataset(
                    settings[study.name].dataset,
                    self.data,
                    announce=lambda line: errors.print(line, soft_wrap=True, markup=False),
                )
                console.print(f"Data: {dataset.description}", highlight=False, soft_wrap=True)
            own = folder / study.name if self.name == ALL else folder
            if self.name == ALL:
                console.rule(f"{number} of {len(chosen)}: {study.name}", align="left")
                console.print(study.question, highlight=False)
            console.print(f"Records and report: {own}", highlight=False, soft_wrap=True, markup=False)
            study.run(settings[study.name], Workplace(own, dataset, self.data, self.jobs, console))
        if self.name == ALL:
            console.rule("all", align="left")
            collect([folder / study.name for study in chosen], STUDIES, folder / "report.html", console)
        return 0
