"""The 5,000 MNIST digits inside the package (see mnist_5000.md): real data where nothing else can be found."""

from __future__ import annotations

import hashlib
import zipfile
from importlib.resources import files

import numpy as np
import torch

from batchlab.lab.data.catalog import MNIST, Dataset

FILE_NAME = "mnist_5000.npz"
TRAINING_COUNT = 4000
# Of the bytes of both arrays, not of the file: the compressed bytes depend on the version of zlib.
CHECKSUM = "6715cb0005a4535be3abc82a2f3255b1dbe7dbd3361bf08c6676d240f3f11f01"


def load_embedded() -> Dataset:
    """Load the digits that come with batchlab: 4,000 for training and 1,000 for testing, 100 of each class.

    Raises:
        ValueError: The file in the installed package is damaged.

    Example:
        >>> digits = load_embedded()
        >>> digits.train_images.shape, digits.test_labels.bincount().tolist()
        (torch.Size([4000, 28, 28]), [100, 100, 100, 100, 100, 100, 100, 100, 100, 100])
    """
    advice = "reinstall batchlab"
    try:
        with (
            files("batchlab.lab.data").joinpath(FILE_NAME).open("rb") as file,
            np.load(file, allow_pickle=False) as archive,
        ):
            images, labels = archive["images"], archive["labels"]
    except (zipfile.BadZipFile, EOFError, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{FILE_NAME} inside batchlab cannot be read ({error}): {advice}") from error
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != CHECKSUM:
        raise ValueError(f"{FILE_NAME} inside batchlab: expected arrays of sha256 {CHECKSUM}, found {found}: {advice}")
    train, test = slice(None, TRAINING_COUNT), slice(TRAINING_COUNT, None)
    return Dataset(
        name=MNIST.name,
        title=MNIST.title,
        class_names=MNIST.class_names,
        source="embedded",
        description=(
            f"{len(labels):,} {MNIST.title} digits that come with batchlab, "
            f"{len(labels[train]):,} for training and {len(labels[test]):,} for testing"
        ),
        train_images=torch.from_numpy(images[train]),
        train_labels=torch.from_numpy(labels[train]).to(torch.int64),
        test_images=torch.from_numpy(images[test]),
        test_labels=torch.from_numpy(labels[test]).to(torch.int64),
        checksums={FILE_NAME: found},
    )
