"""`batchlab build`: compile the kernels now, not at their first use."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from batchlab.kernels import SOURCES
from batchlab.kernels.build import build, compiled, find_compiler, load
from batchlab.kernels.source import Source

__all__ = ["Build"]


def _build(source: Source, errors: Console) -> tuple[Path, str]:
    """A kernel's library, and how it came to be in the cache.

    Raises:
        RuntimeError: it cannot be compiled.
        OSError: the cache fails.
    """
    found = compiled(source)
    if found is not None:
        return found, "was there already"
    find_compiler()  # before anything is said to be compiled
    errors.print(f"compiling {source.path.name} (up to half a minute) ...", markup=False, highlight=False)
    started = time.perf_counter()
    library = build(source, announce=lambda _: None, fall_back=False)
    return library, f"built in {time.perf_counter() - started:.0f} s"


@dataclass(frozen=True)
class Build:
    """Compile every kernel now instead of at its first use: for images, clusters and read-only homes.

    They go to the folder in $BATCHLAB_KERNELS, or without it to batchlab/kernels in the user's cache; where they are
    used the same folder has to be named. They are for this version of torch and this kind of processor.
    """

    def execute(self, console: Console, errors: Console) -> int:
        """Print a line for each; 1 if one fails, with the reason, after the others were tried."""
        failed = False
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compilers are processes of their own
            waiting = [(source, pool.submit(_build, source, errors)) for source in SOURCES]
            for source, result in waiting:
                try:
                    library, how = result.result()
                    load(library)  # so that what is missing is missed now
                except (RuntimeError, OSError) as error:
                    errors.print(f"batchlab: {source.name}: {error}", soft_wrap=True, markup=False, highlight=False)
                    failed = True
                    continue
                line = f"{source.name:<{max(len(other.name) for other in SOURCES)}}  {how}: {library}"
                console.print(line, soft_wrap=True, markup=False, highlight=False)
        if failed:
            errors.print("Without them PyTorch's own operations serve: right, but slower.", soft_wrap=True)
        return int(failed)
