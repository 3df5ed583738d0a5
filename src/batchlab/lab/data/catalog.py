"""The facts about the data sets: their files, checksums, classes and mirrors; and `Dataset`, one loaded set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Source = Literal["folder", "cache", "system", "download", "embedded"]

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"
FILE_NAMES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

# Above the largest file (47,040,016 bytes), so that a file under another file's name is still recognized.
LARGEST_FILE = 2**26


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, and where it came from.

    Attributes:
        name: "mnist" or "fashion".
        title: The name for readers, for instance "Fashion-MNIST".
        class_names: The name of each label, 10 of them.
        source: "folder", "cache", "system", "download" or "embedded".
        description: One phrase for a report: which data, how many images, where from; never a path.
        train_images: (N, 28, 28) uint8, 0 is background.
        train_labels: (N,) int64, 0 to 9.
        test_images: (M, 28, 28) uint8.
        test_labels: (M,) int64.
        checksums: File name -> SHA-256 (hex) of the decompressed file.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    source: Source
    description: str
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    checksums: dict[str, str] = field(repr=False)

    @property
    def checksum(self) -> str:
        """One SHA-256 (hex) for all files together: the same data has the same one wherever it was found."""
        lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(self.checksums.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class CatalogEntry:
    """What is known about a data set before any of its files has been found.

    Attributes:
        name: "mnist" or "fashion".
        title: The name for readers.
        class_names: The name of each label.
        checksums: File name -> SHA-256 (hex) of the decompressed file.
        subfolders: Where to look inside a data folder, besides the folder itself.
        system_folder: Where a system package puts the files.
        package: The Debian package that does so, or None.
        mirrors: Addresses, each ending in "/", below which FILE.gz can be downloaded.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    checksums: dict[str, str]
    subfolders: tuple[str, ...]
    system_folder: str
    package: str | None
    mirrors: tuple[str, ...]


MNIST = CatalogEntry(
    name="mnist",
    title="MNIST",
    class_names=tuple("0123456789"),
    checksums={
        TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    subfolders=("mnist", "MNIST/raw"),
    system_folder="/usr/share/datasets/mnist",
    package=None,
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)

FASHION = CatalogEntry(
    name="fashion",
    title="Fashion-MNIST",
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    checksums={
        TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    subfolders=("fashion", "fashion-mnist", "FashionMNIST/raw"),
    system_folder="/usr/share/datasets/fashion-mnist",
    package="dataset-fashion-mnist",
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
)

CATALOG = {entry.name: entry for entry in (MNIST, FASHION)}


def find_entry(name: str) -> CatalogEntry:
    """Look up a data set by name.

    Raises:
        ValueError: There is no data set of this name.

    Example:
        >>> find_entry("fashion").title
        'Fashion-MNIST'
    """
    if name not in CATALOG:
        allowed = ", ".join(repr(known) for known in CATALOG)
        raise ValueError(f"unknown data set {name!r}; choose one of {allowed}")
    return CATALOG[name]


def recognize_checksum(sha256: str | None) -> tuple[CatalogEntry, str] | None:
    """Find the data set and the file name that a checksum belongs to, or None."""
    for entry in CATALOG.values():
        for name, known in entry.checksums.items():
            if known == sha256:
                return entry, name
    return None
