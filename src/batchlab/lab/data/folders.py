"""Find the four files of a data set in a folder, and read them only if every one is exactly the published file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from batchlab.lab.data.catalog import (
    FILE_NAMES,
    LARGEST_FILE,
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    CatalogEntry,
    Dataset,
    Source,
    recognize_checksum,
)
from batchlab.lab.data.idx import IdxContent, hash_content, read_idx_content

_ORIGINS: dict[Source, str] = {
    "folder": "from the data folder",
    "cache": "from this user's cache",
    "system": "from the system's data sets",
    "download": "downloaded for this run",
}


def find_files(folder: Path) -> dict[str, Path]:
    """Find the files of a data set that lie directly in a folder, plain or compressed: standard name -> path."""
    found = {}
    for name in FILE_NAMES:
        dotted = name.replace("-idx", ".idx")
        for spelling in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
            if (folder / spelling).is_file():
                found[name] = folder / spelling
                break
    return found


def search_folders(folders: Iterable[Path]) -> dict[str, Path]:
    """Take the first folder that has all four files, else the first that has some, else nothing."""
    best: dict[str, Path] = {}
    for folder in folders:
        found = find_files(folder)
        if len(found) == len(FILE_NAMES):
            return found
        best = best or found
    return best


def expand_folder(folder: Path, entry: CatalogEntry) -> tuple[Path, ...]:
    """List the places to look in for a data set below a data folder, the most specific first."""
    return (*(folder / subfolder for subfolder in entry.subfolders), folder)


def read_verified(path: Path, name: str, entry: CatalogEntry, advice: str) -> IdxContent:
    """Read one file of a data set and verify its checksum.

    Args:
        path: The file.
        name: The standard name of the file it should be, a key of `entry.checksums`.
        entry: The data set.
        advice: What the user can do about a wrong file, an imperative clause for the error message.

    Raises:
        ValueError: The file is damaged or another one; the message names file, expected and found checksum, and
            the data set that the file belongs to if it is a known one.
    """
    expected = entry.checksums[name]
    try:
        content = read_idx_content(path, maximum_bytes=LARGEST_FILE)
    except ValueError as error:
        found = hash_content(path, maximum_bytes=LARGEST_FILE) or "none (it cannot be read to its end)"
        raise ValueError(
            f"{error}. Expected sha256 {expected} ({entry.title}'s {name}, decompressed), found {found}: {advice}"
        ) from error
    if content.sha256 != expected:
        raise ValueError(
            f"{path}: expected {entry.title}'s {name}, sha256 {expected} (decompressed), found sha256 "
            f"{content.sha256}{_explain_checksum(content.sha256, entry, advice)}"
        )
    return content


def check_complete(files: dict[str, Path], entry: CatalogEntry) -> None:
    """Raise FileNotFoundError unless all four files of a data set were found."""
    missing = [name for name in FILE_NAMES if name not in files]
    if missing:
        folder = next((path.parent for path in files.values()), "the folder")
        raise FileNotFoundError(
            f"{folder}: expected the four files of {entry.title}, found {len(files)}; "
            f"missing: {', '.join(missing)} (each plain or .gz): add them"
        )


def read_dataset(files: dict[str, Path], entry: CatalogEntry, source: Source, advice: str) -> Dataset:
    """Read and verify the four files of a data set; nothing is returned unless all of them are right.

    Args:
        files: Standard name -> path, as `find_files` returns them.
        entry: The data set.
        source: Where the files were found.
        advice: What the user can do about a wrong file, an imperative clause for the error message.

    Raises:
        FileNotFoundError: Some of the files are missing.
        ValueError: A file is damaged or another one, or images and labels do not belong together.
    """
    check_complete(files, entry)
    contents = {name: read_verified(files[name], name, entry, advice) for name in FILE_NAMES}
    for images, labels in ((TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)):
        _check_pair(files[images], contents[images].array, files[labels], contents[labels].array)
    train, test = len(contents[TRAIN_LABELS].array), len(contents[TEST_LABELS].array)
    return Dataset(
        name=entry.name,
        title=entry.title,
        class_names=entry.class_names,
        source=source,
        description=f"full {entry.title}, {train:,} training and {test:,} test images ({_ORIGINS[source]})",
        train_images=torch.from_numpy(contents[TRAIN_IMAGES].array),
        train_labels=torch.from_numpy(contents[TRAIN_LABELS].array).to(torch.int64),
        test_images=torch.from_numpy(contents[TEST_IMAGES].array),
        test_labels=torch.from_numpy(contents[TEST_LABELS].array).to(torch.int64),
        checksums={name: content.sha256 for name, content in contents.items()},
    )


def _explain_checksum(sha256: str, entry: CatalogEntry, advice: str) -> str:
    """End the message about a wrong file: what it is, where that is known, and what to do."""
    known = recognize_checksum(sha256)
    if known is None:
        return f": {advice}"
    other, name = known
    if other.name != entry.name:
        return f"; this is {other.title}'s {name}: pass --dataset {other.name}, or {advice}"
    return f"; this is {other.title}'s {name} under another name: {advice}"


def _check_pair(images_path: Path, images: NDArray[np.uint8], labels_path: Path, labels: NDArray[np.uint8]) -> None:
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{images_path}: expected images of shape (count, 28, 28), found {images.shape}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{labels_path}: expected {len(images):,} labels, one for each image of {images_path.name}, "
            f"found shape {labels.shape}"
        )
    if len(labels) == 0 or labels.max() > 9:
        found = f"a label {labels.max()}" if len(labels) else "no label at all"
        raise ValueError(f"{labels_path}: expected labels from 0 to 9, found {found}")
