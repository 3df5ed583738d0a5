"""`batchlab study NAME`: run a study, or go on with one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.constructors import PrimitiveConstructorSpec

from batchlab.lab.data import load_dataset
from batchlab.lab.settings import SettingsError, read_settings
from batchlab.lab.studies import STUDIES
from batchlab.lab.study import Study, Workplace

__all__ = ["StudyCommand"]


def _word(metavar: str, read: Callable[[str], Any]) -> Any:
    """How tyro reads an option that takes one word and is None without it."""
    return PrimitiveConstructorSpec[Any](
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: value is None or isinstance(value, (int, Path)),
        str_from_instance=lambda value: [str(value)],
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number above 0")
    return int(text)


# The texts say what an option left out means; "(default: None)" would say less.
_unhinted = tyro.conf.arg(help_behavior_hint="")
_Count = Annotated[int | None, _word("N", _count), _unhinted]
_Folder = Annotated[Path | None, _word("DIR", Path), _unhinted]
_File = Annotated[Path | None, _word("FILE", Path), _unhinted]


@dataclass(frozen=True)
class StudyCommand:
    """Run a study and write its report. Interrupted, the same command goes on where it stopped."""

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
    """Which one; `batchlab studies` lists them."""
    quick: Annotated[bool, _unhinted] = False
    """The smallest size, within a minute; the same as --size quick."""
    size: Annotated[Literal["full", "demo", "quick"] | None, _unhinted] = None
    """full: as published; demo: about five minutes; quick: within one. Without it: full."""
    seeds: _Count = None
    """Runs of each arm, with different random starts."""
    dataset: Annotated[Literal["mnist", "fashion"] | None, _unhinted] = None
    """mnist: handwritten digits (the default); fashion: Fashion-MNIST, pieces of clothing."""
    data: _Folder = None
    """Folder with the IDX files. Without it: $BATCHLAB_DATA, the cache, the system's data sets, download, and at last \
the 5,000 digits that come with batchlab."""
    out: _Folder = None
    """Folder for records and report; it can be continued. Without it: runs/NAME."""
    jobs: _Count = None
    """Parallel processes, one thread each. Without it: one per core."""
    settings: _File = None
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
        changes: dict[str, Any] = {} if self.seeds is None else {"seeds": self.seeds}
        if self.dataset is not None and self.dataset != settings.dataset:
            changes["dataset"] = self.dataset
            if "targets" in known:
                changes["targets"] = ()  # they are the data set's
        if "seeds" in changes and "seeds" not in known:
            raise SettingsError(f"the study {study.name} has no random starts to repeat: leave out --seeds")
        return replace(settings, **changes)

    def _folder(self, study: Study) -> Path:
        size = "quick" if self.quick else self.size
        parts = [
            study.name,
            size if size != "full" else None,
            None if self.dataset in (None, "mnist") else self.dataset,
        ]
        return self.out or Path("runs") / "-".join(part for part in parts if part)

    def execute(self, console: Console, errors: Console) -> int:
        """Load the data, say which, run what is missing, write the report."""
        if self.name not in STUDIES:
            raise SettingsError(f"there is no study {self.name!r}; there are: {', '.join(STUDIES)}")
        study = STUDIES[self.name]
        settings, folder = self._settings(study), self._folder(study)
        dataset = load_dataset(
            settings.dataset, self.data, announce=lambda line: errors.print(line, soft_wrap=True, markup=False)
        )
        console.print(f"Data: {dataset.description}", highlight=False, soft_wrap=True)
        console.print(f"Records and report: {folder}", highlight=False, soft_wrap=True)
        study.run(settings, Workplace(folder, dataset, self.data, self.jobs, console))
        return 0
