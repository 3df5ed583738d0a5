"""Find a data set: the folder asked for, the cache, the system, a download, and at last the digits in the package."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from batchlab.lab.data.catalog import CatalogEntry, Dataset, Source, find_entry
from batchlab.lab.data.embedded import load_embedded
from batchlab.lab.data.folders import check_complete, expand_folder, find_files, read_dataset, search_folders

FOLDER_VARIABLE = "BATCHLAB_DATA"
OFFLINE_VARIABLE = "BATCHLAB_OFFLINE"


def load_dataset(
    name: str = "mnist",
    folder: str | Path | None = None,
    *,
    download: bool = True,
    announce: Callable[[str], None] | None = None,
) -> Dataset:
    """Load a data set from the first place that has it, every file verified by its SHA-256.

    The order: `folder`; else the folder in the environment variable BATCHLAB_DATA; else this user's cache; the
    system's data sets; a download into the cache; and, for "mnist", the 5,000 digits inside batchlab. A `folder` that
    is asked for never falls back to another place, and a file that is found but wrong is always an error.

    Args:
        name: "mnist" or "fashion".
        folder: A folder that holds the four IDX files, plain or .gz, in itself or in a subfolder such as NAME/ or
            MNIST/raw/.
        download: Whether to download; the environment variable BATCHLAB_OFFLINE=1 forbids it, too.
        announce: Called with one line for each thing a user should know on the way.

    Returns:
        Images as uint8 (N, 28, 28), labels as int64 (N,), and where they came from.

    Raises:
        FileNotFoundError: The folder asked for does not exist or lacks files; or the data set is nowhere.
        ValueError: The name is unknown; or a file is truncated, corrupt or another one.

    Example:
        >>> load_dataset("cifar")
        Traceback (most recent call last):
        ValueError: unknown data set 'cifar'; choose one of 'mnist', 'fashion'
    """
    entry = find_entry(name)
    tell = announce or _stay_silent
    if folder is not None:
        return _load_folder(entry, Path(folder).expanduser(), "the data folder")
    looked: list[str] = []
    variable = os.environ.get(FOLDER_VARIABLE, "")
    if variable:
        named = Path(variable).expanduser()
        if _search_folder(entry, named, FOLDER_VARIABLE):
            return _load_folder(entry, named, FOLDER_VARIABLE)
        looked.append(f"{named} (from {FOLDER_VARIABLE})")
        tell(f"{FOLDER_VARIABLE}={variable} has no files of {entry.title}; looking elsewhere")
    return (
        _load_found(entry, looked) or _load_downloaded(entry, looked, download, tell) or _load_last(entry, looked, tell)
    )


def locate_dataset(name: str) -> tuple[Source, Path]:
    """Say where `load_dataset` would take a data set from, without reading or downloading it.

    Returns:
        The kind of place, and the folder: for "download" the one that it would go to.

    Raises:
        FileNotFoundError: It would be nowhere, or a folder lacks some of its files.
        ValueError: The name is unknown.

    Example:
        >>> kind, folder = locate_dataset("mnist")
        >>> kind in ("folder", "cache", "system", "download", "embedded")
        True
    """
    entry = find_entry(name)
    places: list[tuple[Source, dict[str, Path]]] = []
    variable = os.environ.get(FOLDER_VARIABLE, "")
    if variable:
        places.append(("folder", _search_folder(entry, Path(variable).expanduser(), FOLDER_VARIABLE)))
    from batchlab.lab.data.download import locate_cache

    cached = find_files(locate_cache(name))
    if len(cached) == len(entry.checksums):
        places.append(("cache", cached))
    places.append(("system", find_files(Path(entry.system_folder))))
    for source, found in places:
        if found:
            check_complete(found, entry)
            return source, next(iter(found.values())).parent
    if not _offline():
        return "download", locate_cache(name)
    if name == "mnist":
        return "embedded", Path(__file__).parent
    raise FileNotFoundError(f"{entry.title} is not here, and {OFFLINE_VARIABLE} forbids to download it")


def _offline() -> bool:
    return os.environ.get(OFFLINE_VARIABLE, "0") not in ("", "0")


def _load_folder(entry: CatalogEntry, folder: Path, origin: str) -> Dataset:
    """Load from a folder that was asked for, or fail."""
    found = _search_folder(entry, folder, origin)
    if not found:
        places = ", ".join(str(place) for place in expand_folder(folder, entry))
        raise FileNotFoundError(
            f"{origin} {folder} has no files of {entry.title}; expected {', '.join(entry.checksums)}, each plain or "
            f".gz, in one of {places}; name a folder that has them, or none to look elsewhere"
        )
    return read_dataset(found, entry, "folder", "replace it with the original file")


def _search_folder(entry: CatalogEntry, folder: Path, origin: str) -> dict[str, Path]:
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{origin} {folder} {state}; expected a folder with the files of {entry.title} "
            f"({', '.join(entry.checksums)}, each plain or .gz): correct it, or leave it out to look elsewhere"
        )
    return search_folders(expand_folder(folder, entry))


def _load_found(entry: CatalogEntry, looked: list[str]) -> Dataset | None:
    """Load what this machine already has."""
    # At function level: loading a folder that was named must not cost the import of requests.
    from batchlab.lab.data.download import locate_cache

    cache = locate_cache(entry.name)
    found = find_files(cache)
    if len(found) == len(entry.checksums):
        return read_dataset(found, entry, "cache", "delete it, and it will be downloaded again")
    # A cache with some of the files is a download that was interrupted, not an error.
    looked.append(f"{cache} (the cache: {len(found)} of {len(entry.checksums)} files)")
    system = Path(entry.system_folder)
    if found := find_files(system):
        return read_dataset(found, entry, "system", f"reinstall {entry.package or 'the package that it belongs to'}")
    looked.append(f"{system} (the system)")
    return None


def _load_downloaded(
    entry: CatalogEntry, looked: list[str], download: bool, tell: Callable[[str], None]
) -> Dataset | None:
    """Load by downloading; None if that is forbidden or impossible, an error if what arrives is wrong."""
    if not download or _offline():
        looked.append(f"no download ({f'{OFFLINE_VARIABLE} is set' if download else 'it was turned off'})")
        return None
    from batchlab.lab.data.download import DownloadUnavailableError, download_files, locate_cache

    try:
        files = download_files(entry, locate_cache(entry.name), tell)
    except DownloadUnavailableError as error:
        tell(str(error))
        looked.append(f"a download ({error})")
        return None
    return read_dataset(files, entry, "download", "delete it, and it will be downloaded again")


def _load_last(entry: CatalogEntry, looked: list[str], tell: Callable[[str], None]) -> Dataset:
    if entry.name == "mnist":
        dataset = load_embedded()
        tell(f"the full {entry.title} was not found; using {dataset.description}")
        return dataset
    package = f", or install the Debian package {entry.package}" if entry.package else ""
    raise FileNotFoundError(
        f"{entry.title} was not found; looked in: {'; '.join(looked)}. Put its four files "
        f"({', '.join(entry.checksums)}) into a folder and pass --data DIR{package}"
    )


def _stay_silent(line: str) -> None:
    """Announce nothing."""
