"""One report of several studies: contents, a table of questions and answers, then each study's own report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from batchlab.lab.report import Page, write_collection
from batchlab.lab.study import STUDY_FILE, Study, read_study_file

__all__ = ["collect", "find_studies"]

TITLE = "What batch normalization and dropout do, and what their parts are good for"


def find_studies(folders: Iterable[Path]) -> list[Path]:
    """The folders of studies among `folders`, and inside those that are none; each once, in order.

    Raises:
        FileNotFoundError: a folder holds no study.
    """
    found: list[Path] = []
    for folder in folders:
        own = [folder] if (folder / STUDY_FILE).is_file() else []
        inner = own or sorted(path.parent for path in folder.glob(f"*/{STUDY_FILE}"))
        if not inner:
            raise FileNotFoundError(
                f"{folder} holds no study (there is no {STUDY_FILE} in it, nor in a folder of it): pass a study's "
                "--out folder, or one with several of them"
            )
        found += [path for path in inner if path.resolve() not in {other.resolve() for other in found}]
    return found


def _study_in(folder: Path) -> str:
    return str(read_study_file(folder)["study"])


def _read(folder: Path, studies: Mapping[str, Study]) -> Page:
    name = _study_in(folder)
    if name not in studies:
        raise ValueError(f"{folder / STUDY_FILE} names the study {name!r}, which this version does not know")
    return studies[name].read(folder).page


def _in_order(folders: Sequence[Path], studies: Mapping[str, Study]) -> list[Path]:
    """As the studies are listed, whatever their folders are called."""
    places = {name: place for place, name in enumerate(studies)}
    return sorted(folders, key=lambda folder: places.get(_study_in(folder), len(places)))


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """An address for each folder: its name, with a number where it repeats or is no word."""
    named: dict[str, Path] = {}
    for folder in folders:
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in folder.resolve().name)
        alike = sum(1 for other in named if other == name or other.startswith(f"{name}."))
        named[f"{name}.{alike + 1}" if alike else name] = folder
    return named


def collect(folders: Iterable[Path], studies: Mapping[str, Study], path: Path, console: Console) -> None:
    """Write one page of all finished studies in `folders`, and print questions and answers.

    What is not finished is left out, with a note that says so on the page and the console.

    Args:
        folders: of studies, or with folders of studies in them.
        studies: name -> study, in the order of the page.
        path: of the page.
        console: for the table.

    Raises:
        FileNotFoundError: a folder holds no study.
        ValueError: no study is finished.
    """
    pages: dict[str, Page] = {}
    missing: dict[str, str] = {}
    with console.status("reading the records"):
        for name, folder in _named(_in_order(find_studies(folders), studies)).items():
            try:
                pages[name] = _read(folder, studies)
            except ValueError as error:
                missing[name] = str(error)
        if not pages:
            raise ValueError(f"no study is finished: {'; '.join(missing.values())}")
        notes = [f"Not finished, and so not here: {', '.join(missing)}."] if missing else []
        introduction = f"{len(pages)} studies, each with its question, its answer and the evidence, from their records."
        write_collection(TITLE, introduction, pages, path, notes)
    table = Table("question", "answer", show_lines=True)
    for page in pages.values():
        table.add_row(page.title, "\n".join(page.answer))
    console.print(table)
    for name, why in missing.items():
        console.print(f"Left out: {name} ({why})", highlight=False, markup=False, soft_wrap=True)
    console.print("One report of them all:", highlight=False)
    console.print(f"  {path.resolve()}", style="bold", highlight=False, soft_wrap=True)
