"""The digits inside the package: what they are, that damage is noticed, and that their script is repeatable."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from batchlab.lab.data import embedded, load_dataset
from batchlab.lab.data.embedded import load_embedded

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_embedded_digits.py"
DATA = os.environ.get("BATCHLAB_DATA", "")


def test_digits_are_split_evenly() -> None:
    digits = load_embedded()
    assert (digits.name, digits.title, digits.source) == ("mnist", "MNIST", "embedded")
    assert digits.train_images.shape == (4000, 28, 28)
    assert digits.test_images.shape == (1000, 28, 28)
    assert digits.train_images.dtype == digits.test_images.dtype == torch.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    assert digits.description == (
        "5,000 MNIST digits that come with batchlab, 4,000 for training and 1,000 for testing"
    )
    assert digits.class_names == tuple("0123456789")


def test_both_parts_are_shuffled_and_share_no_image() -> None:
    digits = load_embedded()
    for labels in (digits.train_labels, digits.test_labels):
        first = labels[:100].bincount(minlength=10)
        assert first.min() > 0
        assert first.max() < 40
    train = {image.numpy().tobytes() for image in digits.train_images}
    test = {image.numpy().tobytes() for image in digits.test_images}
    assert len(train) + len(test) == len(train | test) == 5000


def test_digits_look_like_digits() -> None:
    digits = load_embedded()
    assert int(digits.train_images.max()) == 255
    assert digits.train_images[:, 0, :].count_nonzero() < 100  # the margin is background
    means = torch.stack([digits.train_images[digits.train_labels == k].float().mean(0) for k in range(10)])
    distances = torch.cdist(digits.test_images.flatten(1).float(), means.flatten(1))
    accuracy = (distances.argmin(1) == digits.test_labels).float().mean()
    assert accuracy > 0.7  # the nearest class mean alone; labels out of step with images give 0.1


@pytest.mark.parametrize("content", [b"", b"not a zip file", None])
def test_a_damaged_package_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    path = tmp_path / embedded.FILE_NAME
    if content is None:
        np.savez_compressed(path, images=np.zeros((5000, 28, 28), np.uint8), labels=np.zeros(5000, np.uint8))
    else:
        path.write_bytes(content)
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=r"mnist_5000\.npz.*reinstall batchlab"):
        load_embedded()


def test_the_script_writes_the_same_bytes_again(tmp_path: Path) -> None:
    digits = load_embedded()
    images = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    labels = torch.cat([digits.train_labels, digits.test_labels])
    order = labels.argsort(stable=True)
    table = torch.cat([images.long(), labels[:, None]], dim=1)[order]
    np.savetxt(tmp_path / "digits.csv.gz", table.numpy(), fmt="%d", delimiter=",")
    outputs = [tmp_path / "first.npz", tmp_path / "second.npz"]
    for output in outputs:
        command = [sys.executable, str(SCRIPT), str(tmp_path / "digits.csv.gz"), "--output", str(output)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("arrays  ")
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    with np.load(outputs[0], allow_pickle=False) as archive:
        assert np.bincount(archive["labels"][:4000]).tolist() == [400] * 10
        assert {image.tobytes() for image in archive["images"]} == {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize(
    ("row", "message"),
    [("1.5", "whole numbers"), ("256", "whole numbers"), ("0,0", "expected a table"), ("0", "digits of each")],
)
def test_the_script_refuses_another_table(tmp_path: Path, row: str, message: str) -> None:
    line = ",".join(["0"] * (785 - row.count(",") - 1) + [row])
    line = line if row != "0,0" else line + ",0"
    (tmp_path / "digits.csv").write_text(f"{line}\n" * 5000)
    output = tmp_path / "digits.npz"
    command = [sys.executable, str(SCRIPT), str(tmp_path / "digits.csv"), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.exists()


def test_every_digit_is_one_of_mnist() -> None:
    try:
        full = load_dataset("mnist", DATA or "BATCHLAB_DATA-is-not-set", download=False)
    except FileNotFoundError as error:
        pytest.skip(f"the full MNIST is not at hand: {error}")
    known = {
        image.tobytes(): int(label)
        for image, label in zip(full.train_images.numpy(), full.train_labels.numpy(), strict=True)
    }
    digits = load_embedded()
    for images, labels in (
        (digits.train_images, digits.train_labels),
        (digits.test_images, digits.test_labels),
    ):
        assert all(
            known.get(image.tobytes()) == int(label) for image, label in zip(images.numpy(), labels, strict=True)
        )
