"""`batchlab build`: compile the kernels now, not at their first use."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console

from batchlab.kernels import SOURCES
from batchlab.kernels.build import build, compiled, load
from batchlab.kernels.source import Source

__all__ = ["Build"]


def _build(source: Source, errors: Console) -> str:
    """How a kernel came to be in the cache, and where it is.

    Raises:
        RuntimeError: it cannot be compiled, or not be loaded.
        OSError: the cache fails.
    """
    started = time.perf_counter()
    there = compiled(source) is not None
    library = build(
        source, lambda line: errors.print(line, soft_wrap=True, markup=False, highlight=False), fall_back=False
    )
    load(library)  # here, so that what is missing is missed before the first use
    how = "was there already" if there else f"built in {time.perf_counter() - started:.0f} s"
    return f"{how}: {library}"


@dataclass(frozen=True)
class Build:
    """Compile every kernel now instead of at its first use: for images, clusters and read-only homes.

    They go to the folder in $BATCHLAB_KERNELS, or without it to batchlab/kernels in the user's cache; where they are
    used the same folder has to be named. They are for this version of torch and this kind of processor.
    """

    def execute(self, console: Console, errors: Console) -> int:
        """Print a line for each; 1 if one fails, with the reason, after the others were tried."""
        failed = False
        for source in SOURCES:
            try:
                line = _build(source, errors)
            except (RuntimeError, OSError) as error:
                errors.print(f"batchlab: {source.name}: {error}", soft_wrap=True, markup=False, highlight=False)
                failed = True
                continue
            console.print(f"{source.name:<12} {line}", soft_wrap=True, markup=False, highlight=False)
        if failed:
            errors.print("Without them PyTorch's own operations serve: right, but slower.", soft_wrap=True)
        return int(failed)
