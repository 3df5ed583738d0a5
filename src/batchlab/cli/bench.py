"""`batchlab bench dropout`: from which p do submatrices pay, on this machine?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from batchlab.lab.break_even import LABELS, DropoutTimes, break_evens, measure, reading
from batchlab.lab.dropout_timing import mlp, step_flops
from batchlab.lab.records import describe_environment
from batchlab.lab.settings import SettingsError

__all__ = ["Bench"]

BENCHMARKS: Final = ("dropout",)
OVERHEAD: Final = 10**9
"""Operations that take about as long as what a cell of the table costs whatever its width; for the progress bar."""


def _check(name: str, values: Sequence[Any], allowed: str, fits: bool) -> None:
    if not fits:
        raise SettingsError(f"{name} is {' '.join(map(str, values)) or 'empty'}; allowed: {allowed}")


def _table(times: Sequence[DropoutTimes], title: str) -> Table:
    table = Table(title=title)
    for column in ("width", "p", *LABELS.values(), "auto takes", "times as fast"):
        table.add_column(
            column, justify="left" if column == "auto takes" else "right", no_wrap=column in LABELS.values()
        )
    for index, found in enumerate(times):
        first = index == 0 or times[index - 1].width != found.width
        if first and index:
            table.add_section()
        table.add_row(
            str(found.width) if first else "",
            f"{found.rate:g}",
            # The fastest stands out.
            *(
                f"[bold]{1e3 * found.seconds[kind].median:.3g}[/]"
                if kind == found.fastest
                else f"{1e3 * found.seconds[kind].median:.3g}"
                for kind in LABELS
            ),
            LABELS[found.chosen],
            f"{found.gain[found.chosen].median:.2f}",
        )
    return table


@dataclass(frozen=True)
class Bench:
    """Measure on this machine what a mechanism costs and saves: `batchlab bench dropout`."""

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
    """Which one; there is dropout: nn.Dropout against batchwise dropout."""
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    """Units of both hidden layers."""
    rates: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    """Shares p of the hidden units that are dropped."""
    batch: int = 128
    """Samples in a training step."""
    threads: int = 0
    """Of torch; 0: as many as it takes by itself."""

    def execute(self, console: Console, errors: Console) -> int:
        """Measure, print the table, and say from which p on submatrices are faster."""
        if self.name not in BENCHMARKS:
            raise SettingsError(f"there is no benchmark {self.name!r}; there is: {', '.join(BENCHMARKS)}")
        widths, rates = sorted(set(self.widths)), sorted(set(self.rates))
        _check(
            "--widths",
            self.widths,
            "one or more from 2 to 16384",
            bool(widths) and 2 <= widths[0] <= widths[-1] <= 16384,
        )
        _check("--rates", self.rates, "one or more above 0 and below 1", bool(rates) and 0 < rates[0] <= rates[-1] < 1)
        _check("--batch", [self.batch], "1 to 65536", 1 <= self.batch <= 65536)
        _check("--threads", [self.threads], "0 to 1024", 0 <= self.threads <= 1024)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            times = self._measure(widths, rates, errors)
            threads = torch.get_num_threads()
        finally:
            torch.set_num_threads(before)
        console.print(f"Network: 784-n-n-10 with ReLU, dropout p of both hidden layers, batch {self.batch}.")
        console.print(f"Machine: {describe_environment()['processor']}, {threads} thread{'s' * (threads != 1)}.")
        console.print(_table(times, "milliseconds of a whole training step (medians)"))
        console.print("Submatrices are faster than nn.Dropout from")
        for width, words in break_evens(times).items():
            console.print(f"  width {width:>5}: {words}")
        console.print(reading(times), soft_wrap=True)
        return 0

    def _measure(self, widths: Sequence[int], rates: Sequence[float], errors: Console) -> list[DropoutTimes]:
        costs = {width: OVERHEAD + step_flops(mlp((width, width)), self.batch) for width in widths}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        times: list[DropoutTimes] = []
        # Drawn between rounds only: a thread that draws would take its time from what is measured.
        with Progress(
            *columns, TextColumn("left:"), TimeRemainingColumn(), console=errors, transient=True, auto_refresh=False
        ) as bar:
            task = bar.add_task("measuring", total=len(rates) * sum(costs.values()))

            def advance(width: int, share: float) -> None:
                bar.advance(task, share * costs[width])
                bar.refresh()

            for width in widths:
                bar.update(task, description=f"width {width}")
                bar.refresh()
                times += measure(width, rates, self.batch, on_progress=partial(advance, width))
        return times
