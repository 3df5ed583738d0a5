"""What a study claims, as numbers, and whether the study done again (other seeds, other data) says the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from batchlab.lab.comparison import Estimate
from batchlab.lab.files import read_json, write_json
from batchlab.lab.report import Table

__all__ = [
    "CLAIMS_FILE",
    "Claim",
    "Told",
    "again",
    "comparison_table",
    "count",
    "markdown",
    "read_claims",
    "write_claims",
]

CLAIMS_FILE: Final = "claims.json"


@dataclass(frozen=True)
class Claim:
    """One number that a study answers with.

    Args:
        text: what it is a number of; the same whenever the study is done.
        value: with its interval; None: there is none, because not every run got far enough.
        neutral: the value that would say nothing: 1 for a ratio, 0 for a difference.
        percent: a difference of shares, shown in percentage points.
    """

    text: str
    value: Estimate | None
    neutral: float = 1.0
    percent: bool = False

    @property
    def side(self) -> int | None:
        """1: clearly above `neutral`; -1: clearly below; 0: not clear; None: no value, or one seed and no interval."""
        value = self.value
        if value is None or math.isnan(value.low) or math.isnan(value.high):
            return None
        above = value.low >= self.neutral < value.mean
        below = value.high <= self.neutral > value.mean
        return int(above) - int(below)


@dataclass(frozen=True)
class Told:
    """The claims of one finished study.

    Args:
        study: its name.
        title: data set and seeds, in words.
        command: that repeats it.
        claims: in the study's order.
    """

    study: str
    title: str
    command: str
    claims: Sequence[Claim]


HOLDS: Final = "again"
"""The verdict on a clear claim that is clear again, on the same side."""


def again(first: Claim, other: Claim) -> str:
    """What the study done again says about a claim, in words.

    >>> again(Claim("ratio", Estimate(2.0, 1.5, 2.7, 5)), Claim("ratio", Estimate(1.8, 1.2, 2.7, 5)))
    'again'
    >>> again(Claim("ratio", Estimate(2.0, 1.5, 2.7, 5)), Claim("ratio", Estimate(1.2, 0.8, 1.8, 5)))
    'not clear here'
    """
    if first.value is None or other.value is None:
        if first.value is None and other.value is None:
            return "again not reached"
        return "not reached here" if other.value is None else "reached here"
    sides = first.side, other.side
    if None in sides:
        return "one seed cannot say"
    if sides[0] == sides[1]:
        return HOLDS if sides[0] else "again not clear"
    if sides[1] == 0:
        return "not clear here"
    return "clear here" if sides[0] == 0 else "the opposite"


def _digits(value: float) -> str:
    if not math.isfinite(value):
        return "more" if value > 0 else "less"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _shown(claim: Claim) -> str:
    value = claim.value
    if value is None:
        return "not in every run"
    numbers = (value.mean, value.low, value.high)
    texts = [f"{100 * n:+.2f}" for n in numbers] if claim.percent else [_digits(n) for n in numbers]
    return texts[0] if math.isnan(value.low) else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _pairs(first: Told, other: Told) -> list[tuple[Claim, Claim]]:
    theirs = {claim.text: claim for claim in other.claims}
    return [(claim, theirs[claim.text]) for claim in first.claims if claim.text in theirs]


def comparison_table(told: Sequence[Told]) -> Table:
    """The first study's claims, a row each; a column for each study, with what it says of the claim.

    Raises:
        ValueError: they are different studies, have no claim in common, or are the same runs.
    """
    first, *others = told
    if len({each.study for each in told}) > 1:
        raise ValueError(
            f"these are different studies ({', '.join(each.study for each in told)}): compare like with like"
        )
    if any((other.title, other.command) == (first.title, first.command) for other in others):
        raise ValueError(f"both are {first.study} on {first.title}: do it again with --first-seed")
    rows = []
    for claim in first.claims:
        cells = [claim.text, _shown(claim)]
        for other in others:
            theirs = next((each for each in other.claims if each.text == claim.text), None)
            cells.append("–" if theirs is None else f"{_shown(theirs)}: {again(claim, theirs)}")
        rows.append(cells)
    if others and not any(_pairs(first, other) for other in others):
        raise ValueError(f"the studies have no claim in common: {first.title}; {'; '.join(o.title for o in others)}")
    return Table(["claim", *(each.title for each in told)], rows, "")


def count(first: Told, other: Told) -> str:
    """How many claims hold, in a sentence."""
    clear = [(a, b) for a, b in _pairs(first, other) if a.side]
    found = Counter(again(a, b) for a, b in clear)
    held = found.pop(HOLDS, 0)
    rest = "".join(f"; {number} {verdict}" for verdict, number in sorted(found.items(), key=lambda item: -item[1]))
    open_ones = [(a, b) for a, b in _pairs(first, other) if not a.side]
    same = sum(again(a, b).startswith("again") for a, b in open_ones)
    number = f"{held} {'is' if held == 1 else 'are'}"
    text = f"{other.title}: of {len(clear)} clear claims {number} clear again, the same way{rest}"
    return f"{text}. Of {len(open_ones)} that were not clear or not reached, {same} say the same again."


def markdown(told: Sequence[Told]) -> str:
    """The comparison as a part of a Markdown page: how many claims hold, the commands, and every claim."""
    table = comparison_table(told)
    first, *others = told
    lines = [f"## {first.study}", ""]
    lines += [f"- {count(first, other)}" for other in others]
    lines += ["", *(f"    {each.command}" for each in told), ""]
    lines += [f"| {' | '.join(table.header)} |", "|---" * len(table.header) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join([*lines, ""])


def _plain(value: Estimate | None) -> dict[str, Any] | None:
    """For JSON, which has no infinity and no NaN: such an end of an interval is a word."""
    if value is None:
        return None
    ends = {"low": value.low, "high": value.high}
    words = {name: end if math.isfinite(end) else str(end) for name, end in ends.items()}
    return {"mean": value.mean, **words, "n": value.n}


def write_claims(told: Told, path: Path) -> None:
    """Write the claims of a finished study as JSON."""
    claims = [
        {"text": c.text, "value": _plain(c.value), "neutral": c.neutral, "percent": c.percent} for c in told.claims
    ]
    write_json(path, {"study": told.study, "title": told.title, "command": told.command, "claims": claims})


def _estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    return None if value is None else Estimate(value["mean"], float(value["low"]), float(value["high"]), value["n"])


def read_claims(folder: Path) -> Told:
    """Read what the finished study in `folder` claims.

    Raises:
        FileNotFoundError: there are no claims in it.
        ValueError: the file is damaged.
    """
    path = folder / CLAIMS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: finish the study with the command it was started with, or, if it is finished, write "
            f"its report again: batchlab report {folder}"
        )
    content = read_json(path)
    try:
        claims = [
            Claim(str(c["text"]), _estimate(c["value"]), float(c["neutral"]), bool(c["percent"]))
            for c in content["claims"]
        ]
        return Told(str(content["study"]), str(content["title"]), str(content["command"]), claims)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a file of claims ({error!r}): write it again: batchlab report {folder}"
        ) from error
