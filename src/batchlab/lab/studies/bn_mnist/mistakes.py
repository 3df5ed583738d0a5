"""The test images that a network still gets wrong, kept so that the report can show them without data or weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from batchlab.lab.data import Dataset
from batchlab.lab.files import read_json, write_json
from batchlab.lab.records import RunRecord
from batchlab.lab.report import png
from batchlab.lab.run import build_network
from batchlab.lab.training import prepare_images

__all__ = ["MISTAKES_FILE", "save_mistakes"]

MISTAKES_FILE = "mistakes.json"


@torch.no_grad()
def save_mistakes(folder: Path, name: str, record: RunRecord, dataset: Dataset) -> None:
    """Write mistakes.json: each wrong test image of run `name`, its label and the network's two best guesses.

    Sorted by the probability given to the wrong answer, highest first. A file that is there, of the same run, stays:
    records are kept without weights.

    Raises:
        ValueError: the run's weights are missing or damaged.
    """
    if (folder / MISTAKES_FILE).is_file() and read_json(folder / MISTAKES_FILE).get("run") == name:
        return
    path = folder / name / "weights.safetensors"
    weights = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(weights).hexdigest() != record.result["weights_sha256"]:
        raise ValueError(
            f"{path} is missing or damaged, and the report shows what these weights get wrong: delete "
            f"{folder / name} and run the study again"
        )
    network = build_network(record.settings, dataset)
    network.load_state_dict(load(weights))
    network.eval()
    images = prepare_images(dataset.test_images, record.settings.data.binarize)
    probabilities = network(images).softmax(1)
    values, guesses = probabilities.topk(2)
    wrong = (guesses[:, 0] != dataset.test_labels).nonzero().flatten()
    order = wrong[values[wrong, 0].argsort(descending=True, stable=True)]
    mistakes: list[dict[str, Any]] = [
        {
            "index": int(index),
            "label": int(dataset.test_labels[index]),
            "guesses": guesses[index].tolist(),
            "probabilities": [round(value, 3) for value in values[index].tolist()],
            "png": png(dataset.test_images[index]),
        }
        for index in order
    ]
    content = {"run": name, "images": len(images), "class_names": list(dataset.class_names), "mistakes": mistakes}
    write_json(folder / MISTAKES_FILE, content)
