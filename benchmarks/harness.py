"""Interleaved A/B timing: candidates take turns, so that a machine that drifts drifts for all of them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from batchlab.lab.records import describe_environment
from batchlab.lab.timing import ratio, take_turns

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Medians of one candidate.

    Args:
        seconds: median time of one call.
        ratio: median over rounds of its time divided by the first candidate's in the same round.
        low: first quartile of these ratios.
        high: third quartile.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    title: str,
    calls: int = 1,
    warm_up: int = 1,
    untimed: int = 0,
) -> dict[str, Timing]:
    """Time the candidates in turn, `rounds` times `calls` after the warm-up; ratios are to the first candidate.

    See `batchlab.lab.timing.take_turns`.
    """
    # Drawn between rounds only: a thread that draws would take its time from the candidates'.
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task(title, total=rounds)

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        times = take_turns(candidates, rounds, calls=calls, warm_up=warm_up, untimed=untimed, on_round=advance)
    first = next(iter(times.values()))
    found = {}
    for name, values in times.items():
        spread = ratio(values, first)
        found[name] = Timing(median(values), spread.median, spread.low, spread.high)
    return found


def print_timings(title: str, timings: Mapping[str, Timing], per_call: int = 1) -> None:
    """A table of medians and of ratios to the first candidate."""
    base = next(iter(timings))
    table = Table(title=title)
    for column in ("", "median", f"times {base}", "quartiles"):
        table.add_column(column, justify="left" if not column else "right")
    for name, timing in timings.items():
        microseconds = 1e6 * timing.seconds / per_call
        table.add_row(name, f"{microseconds:,.0f} µs", f"{timing.ratio:.3f}", f"{timing.low:.3f} to {timing.high:.3f}")
    Console().print(table)


def report(benchmark: str, case: str, timings: Mapping[str, Timing], rounds: int, per_call: int = 1) -> None:
    """Print a table and append the result, with machine and versions, to benchmarks/results/<benchmark>.jsonl."""
    print_timings(f"{benchmark}: {case}", timings, per_call)
    line = {
        "benchmark": benchmark,
        "case": case,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "environment": describe_environment(),
        "microseconds": {name: round(1e6 * t.seconds / per_call, 2) for name, t in timings.items()},
        "ratio": {name: [round(t.ratio, 4), round(t.low, 4), round(t.high, 4)] for name, t in timings.items()},
    }
    append(benchmark, line)


def append(benchmark: str, line: Mapping[str, Any]) -> None:
    """Append a line to benchmarks/results/<benchmark>.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
