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


@pytest.fixture(autouse=True)
def embedded_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes find no other data than the embedded digits, whatever the environment names."""
    monkeypatch.setenv("BATCHLAB_DATA", "")
    monkeypatch.setenv("BATCHLAB_OFFLINE", "1")
