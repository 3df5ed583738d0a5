"""A kernel's C++ source: the files that it is made of, and how they are compiled."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Source", "included"]

STABLE_INTERFACE: Final = ("-DTORCH_TARGET_VERSION=0x020b000000000000",)
"""Torch's stable interface as of 2.11, so that a build serves later versions of torch too."""

_INCLUDE: Final = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One C++ file, which becomes one library.

    Args:
        path: the file; headers that it names in quotes lie beside it.
        flags: of the compiler, after those of all kernels, which they overrule.
        libraries: of torch, to link with.
    """

    path: Path
    flags: tuple[str, ...] = STABLE_INTERFACE
    libraries: tuple[str, ...] = ("torch_cpu", "c10")

    @property
    def name(self) -> str:
        """What it is called in messages and in the cache."""
        return self.path.stem


def included(path: Path) -> tuple[Path, ...]:
    """The file and all that it includes by `#include "..."`, directly or not, each once and in order of the names.

    What is not found beside the including file is the compiler's to find, or to complain about. No condition is
    evaluated: an include that a platform skips counts as well.
    """
    found = {path.resolve()}
    waiting = [*found]
    while waiting:
        current = waiting.pop()
        for name in _INCLUDE.findall(current.read_text(encoding="utf-8", errors="replace")):
            file = (current.parent / name).resolve()
            if file not in found and file.is_file():
                found.add(file)
                waiting.append(file)
    return tuple(sorted(found))
