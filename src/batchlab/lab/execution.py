"""Many runs: in parallel processes through joblib, with one progress bar, stoppable and resumable."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from batchlab.lab.records import read_metrics
from batchlab.lab.run import execute
from batchlab.lab.settings import RunSettings

__all__ = ["run_all", "usable_cores"]


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _done(settings: RunSettings, folder: Path) -> int:
    """Steps a run has behind it, by what lies in its folder."""
    if (folder / "result.json").is_file():
        return settings.steps
    metrics = read_metrics(folder / "metrics.jsonl")
    return int(metrics[-1]["step"]) if metrics else 0


@contextmanager
def _progress(plan: Mapping[Path, RunSettings], title: str, console: Console) -> Iterator[None]:
    """Show the steps of all runs while the body works; the runs' own files tell, wherever they are executed."""
    total = sum(settings.steps for settings in plan.values())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[runs]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
    )
    stop = threading.Event()

    def refresh(task: TaskID) -> None:
        done = {folder: _done(settings, folder) for folder, settings in plan.items()}
        ended = sum((folder / "result.json").is_file() for folder in plan)
        bar.update(task, completed=sum(done.values()), runs=f"{ended}/{len(plan)} runs")

    with bar:
        task = bar.add_task(title, total=total, runs="", completed=0)
        refresh(task)

        def watch() -> None:
            while not stop.wait(0.5):
                refresh(task)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            refresh(task)


def run_all(
    plan: Mapping[Path, RunSettings],
    title: str,
    *,
    checksum: str,
    data_folder: Path | None = None,
    jobs: int | None = None,
    console: Console | None = None,
) -> None:
    """Execute the runs of `plan` (folder -> settings) that are not finished yet.

    Args:
        plan: the runs.
        title: for the progress bar.
        checksum: of the data set, already loaded once by the caller.
        data_folder: passed on to `load_dataset`.
        jobs: processes, each with one torch thread; None: as many as usable cores. An enclosing
            `joblib.parallel_config(backend="dask")` sends the runs to a cluster instead.
        console: where progress is shown.
    """
    jobs = jobs or usable_cores()
    # Workers live on from call to call, in the working directory that they were started in.
    data_folder = data_folder.resolve() if data_folder else None
    waiting = {folder.resolve(): run for folder, run in plan.items() if not (folder / "result.json").is_file()}
    if not waiting:
        return
    with _progress(plan, title, console or Console(stderr=True)):
        if jobs == 1 or len(waiting) == 1:
            for folder, settings in waiting.items():
                execute(settings, folder, data_folder, checksum)
            return
        tasks = (
            delayed(execute)(settings, folder, data_folder, checksum, in_worker=True)
            for folder, settings in waiting.items()
        )
        try:
            # Unordered and one at a time: a failed run is reported at once, not after the others.
            for _ in Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch=jobs)(tasks):
                pass
        except BaseException:
            get_reusable_executor().shutdown(wait=False, kill_workers=True)
            raise
