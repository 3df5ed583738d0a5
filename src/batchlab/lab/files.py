"""Files that are either the old ones or the new ones, and folders that one process at a time works in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["FolderInUseError", "locked", "read_json", "write_bytes", "write_json", "write_text"]


class FolderInUseError(RuntimeError):
    """Another process works in the folder."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write the file atomically: after a crash at any moment it is the old one or the new one, never a part."""
    # The process id keeps two writers' temporary files apart; the rename decides who was last.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON atomically; NaN and infinities, which JSON has not, are refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a damaged file is a ValueError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): restore it, or delete it to have it made again"
        ) from error


def _try_lock(stream: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: no lock, and no harm while only one process uses the folder
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def locked(folder: Path, name: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the folder's lock `name`; the system releases it when the process ends, however it ends.

    Args:
        folder: an existing folder.
        name: of the lock; its file is `name`.lock.
        patience: seconds to wait for another holder.

    Raises:
        FolderInUseError: another process held the lock for all that time.
    """
    with (folder / f"{name}.lock").open("w") as stream:
        deadline = time.monotonic() + patience
        while not _try_lock(stream):
            if time.monotonic() >= deadline:
                raise FolderInUseError(f"another process is working in {folder}: wait for it, or choose another folder")
            time.sleep(0.1)
        # Only the holder writes here, so a temporary file is what a killed one left.
        for leftover in folder.glob(".*.partial"):
            leftover.unlink(missing_ok=True)
        yield
