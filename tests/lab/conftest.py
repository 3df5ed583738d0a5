"""Small data for fast runs: the first embedded digits."""

import dataclasses

import pytest

from batchlab.lab.data import Dataset, load_embedded


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """600 training and 200 test digits."""
    full = load_embedded()
    return dataclasses.replace(
        full,
        train_images=full.train_images[:600],
        train_labels=full.train_labels[:600],
        test_images=full.test_images[:200],
        test_labels=full.test_labels[:200],
    )
