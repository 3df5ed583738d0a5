"""Words of the command line to a command; a mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Final

import tyro

from batchlab.cli.build import Build
from batchlab.cli.info import Info

__all__ = ["parse"]

Installation = Annotated[Build, tyro.conf.subcommand("build")] | Annotated[Info, tyro.conf.subcommand("info")]
COMMANDS: Final = ("studies", "study", "report", "compare", "bench", "build", "info")

_BOX: Final = "╭╮╰╯─│+-|"  # rich falls back to the last three where the terminal knows no others


def _one_line(message: str) -> str:
    """The title and first paragraph of tyro's box."""
    lines = [line.strip() for line in message.splitlines()]
    title = lines[0].strip(f"{_BOX} ") if lines else "wrong arguments"
    body: list[str] = []
    for line in lines[1:]:
        inner = line.strip("│| ")
        if inner and not inner.strip(_BOX):
            if body:
                break
            continue
        body.append(inner)
    text = " ".join(part for part in body if part)
    # "Value error" says nothing that the text does not say better.
    return text if title == "Value error" or text.lower().startswith(title.lower()) else f"{title}: {text}"


def _commands(words: Sequence[str]) -> Any:
    if words[:1] in (["build"], ["info"]):
        return Installation  # without what studies import: at once, and also where a part of that is broken
    from batchlab.cli.bench import Bench
    from batchlab.cli.compare import Compare
    from batchlab.cli.report import Report
    from batchlab.cli.studies import Studies
    from batchlab.cli.study import StudyCommand

    return (
        Annotated[Studies, tyro.conf.subcommand("studies")]
        | Annotated[StudyCommand, tyro.conf.subcommand("study")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
        | Installation
    )


def parse(words: Sequence[str]) -> Any:
    """Return the command that `words` ask for, ready to be executed; exits with 2 if they make no sense."""
    complaint = io.StringIO()
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                _commands(list(words)),
                prog="batchlab",
                args=list(words),
                config=config,
                description="The papers' experiments in one command each. Start with: batchlab study bn-mnist --quick",
            )
    except SystemExit as end:
        if end.code:
            known = next((word for word in words if word in COMMANDS), "")
            help_command = " ".join(["batchlab", known, "--help"]).replace("  ", " ")
            print(f"batchlab: {_one_line(complaint.getvalue())} (see {help_command})", file=sys.stderr)
        raise
