"""The command line: `studies`, `study NAME`, `report DIR`, `compare DIR AGAIN`, `bench NAME`, `build`, `info`.

A thin module each.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence

from rich.console import Console

from batchlab.cli.arguments import parse
from batchlab.lab.files import FolderInUseError

__all__ = ["main"]


def _program() -> str:
    """How to call this program again: its name if that is found, else as it was called."""
    if shutil.which("batchlab"):
        return "batchlab"
    started = sys.argv[0]
    return "python -m batchlab.cli" if started.endswith("__main__.py") else shlex.quote(started)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, highlight=False)
    try:
        code: int = parse(words).execute(Console(), errors)
        return code
    except KeyboardInterrupt:
        if words[:1] in (["bench"], ["info"]):
            errors.print("\nStopped.")
            return 130
        errors.print("\nStopped. Everything done so far is kept; the same command goes on from there:")
        errors.print(f"  {_program()} {shlex.join(words)}", style="bold", soft_wrap=True, markup=False)
        return 130
    except (ValueError, OSError) as error:  # a folder that cannot be written to, a full disk
        errors.print(f"batchlab: {error}", soft_wrap=True, markup=False)
        return 2
    except FolderInUseError as error:
        errors.print(f"batchlab: {error}", soft_wrap=True, markup=False)
        return 1
