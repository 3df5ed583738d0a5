"""Download the files of a data set into the user's cache; a file is kept only after its checksum has been verified."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

try:
    import pooch
    import requests
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is missing, which finds and fills the cache of data sets: pip install 'batchlab[lab]'",
        name=error.name,
    ) from error

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from batchlab.lab.data.catalog import FILE_NAMES, TEST_LABELS, CatalogEntry
from batchlab.lab.data.folders import find_files, read_verified

TIMEOUT_SECONDS = 4.0
# A compressed file must arrive as it is: without this header a server may offer to have it decompressed on the way.
_HEADERS = {"Accept-Encoding": "identity"}


class DownloadUnavailableError(OSError):
    """No mirror can be reached, or the cache cannot be written: the search goes on without the download."""


def locate_cache(name: str) -> Path:
    """Return the folder of this user's cache that holds a data set; it need not exist."""
    return Path(pooch.os_cache("batchlab")) / name


class _Bar:
    """A progress bar as pooch drives one: it sets `total`, then calls `update` with the bytes of each chunk."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress = progress
        self.task = progress.add_task(title, total=None)

    @property
    def total(self) -> float | None:
        return self.progress.tasks[self.task].total

    @total.setter
    def total(self, value: float) -> None:
        self.progress.update(self.task, total=value)

    def update(self, count: int) -> None:
        self.progress.advance(self.task, count)

    def reset(self) -> None:
        # Called once at the end, before pooch fills the bar up by hand.
        self.progress.update(self.task, completed=0)

    def close(self) -> None:
        self.progress.stop_task(self.task)


def fetch(url: str, path: Path) -> None:
    """Download one address to one file.

    Raises:
        requests.RequestException: The address cannot be reached within `TIMEOUT_SECONDS`, or does not have the file.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        options = {"timeout": TIMEOUT_SECONDS, "headers": _HEADERS, "chunk_size": 2**16}
        bar = _Bar(progress, path.name)
        pooch.HTTPDownloader(progressbar=bar, **options)(url, str(path), None)


def select_reachable(mirrors: tuple[str, ...]) -> tuple[str, ...]:
    """Ask all mirrors for one small file at once and return those that have it, in the order given.

    A socket's own time-out counts once for each of a host's addresses and not at all for the name server; only
    waiting for threads gives an offline machine its answer within `TIMEOUT_SECONDS`.
    """
    answered = [threading.Event() for _ in mirrors]

    def ask(mirror: str, event: threading.Event) -> None:
        try:
            probe = pooch.HTTPDownloader(timeout=TIMEOUT_SECONDS)
            if probe(f"{mirror}{TEST_LABELS}.gz", None, None, check_only=True):
                event.set()
        except requests.RequestException:  # an unreachable mirror is the answer, not a failure
            pass

    threads = [threading.Thread(target=ask, args=pair, daemon=True) for pair in zip(mirrors, answered, strict=True)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return tuple(mirror for mirror, event in zip(mirrors, answered, strict=True) if event.is_set())


def download_files(entry: CatalogEntry, folder: Path, announce: Callable[[str], None] | None = None) -> dict[str, Path]:
    """Download what a cache folder lacks of a data set.

    Args:
        entry: The data set.
        folder: The cache folder; made if necessary. Files that are already there are kept.
        announce: Called with one line for each file.

    Returns:
        Standard name -> path, all four.

    Raises:
        DownloadUnavailableError: No mirror delivers a file, or the folder cannot be written.
        ValueError: No mirror has the right file, and at least one has a wrong one, which was not kept.
    """
    mirrors = select_reachable(entry.mirrors)
    if not mirrors:
        raise DownloadUnavailableError(f"no mirror of {entry.title} answers within {TIMEOUT_SECONDS:g} seconds")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = find_files(folder)
        # The same file system as the cache, so that replacing is one step: a killed download leaves no half file.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as workspace:
            for name in FILE_NAMES:
                if name not in files:
                    verified = _download_file(entry, name, mirrors, Path(workspace), announce)
                    files[name] = folder / verified.name
                    verified.replace(files[name])
    except DownloadUnavailableError:
        raise
    except OSError as error:
        raise DownloadUnavailableError(f"the cache folder {folder} cannot be written ({error.strerror})") from error
    return files


def _download_file(
    entry: CatalogEntry,
    name: str,
    mirrors: tuple[str, ...],
    workspace: Path,
    announce: Callable[[str], None] | None,
) -> Path:
    """Try one mirror after the other; return the verified file, still in the workspace."""
    path = workspace / f"{name}.gz"
    failures: list[str] = []
    mismatch: ValueError | None = None
    for mirror in mirrors:
        url, host = f"{mirror}{name}.gz", urlsplit(mirror).hostname
        if announce is not None:
            announce(f"downloading {entry.title}'s {name} from {host}")
        try:
            fetch(url, path)
        except requests.RequestException as error:
            failures.append(f"{host}: {type(error).__name__}")
            continue
        try:
            read_verified(path, name, entry, "try again later, or set BATCHLAB_OFFLINE=1 (it was not kept)")
        except ValueError as error:
            mismatch = ValueError(f"the download from {url} is not the right file: {error}")
            continue
        return path
    if mismatch is not None:
        raise mismatch
    raise DownloadUnavailableError(f"{entry.title}'s {name} cannot be downloaded ({'; '.join(failures)})")
