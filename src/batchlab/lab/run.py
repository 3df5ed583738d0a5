"""One run: train, evaluate and record, so that it can be killed at any moment and ends the same to the last bit."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from batchlab.lab.data import Dataset, hold_out, load_dataset
from batchlab.lab.files import locked, read_json, write_bytes, write_json, write_text
from batchlab.lab.landscape import landscape
from batchlab.lab.measures import learned_slopes, signals, variance_shifts, weight_lengths
from batchlab.lab.networks import MLP, ConvolutionalNetwork, build
from batchlab.lab.optimizers import follow, make_optimizer, prepare
from batchlab.lab.records import describe_run
from batchlab.lab.settings import RunSettings, from_dict, to_dict
from batchlab.lab.shifts import expected_shifts, mean_shifts
from batchlab.lab.training import (
    activation_percentiles,
    batch_order,
    evaluate,
    evaluation_steps,
    learning_rate,
    prepare_images,
    train,
)
from batchlab.surgery import fold, recalibrate

__all__ = ["RunInput", "build_network", "execute", "load_inputs", "run"]

PROBE_IMAGES = 1200  # 20 batches of 60 for each set of percentiles
SIGNAL_IMAGES = 1000
DIGEST = 32  # bytes of SHA-256, in front of a checkpoint


Network = MLP | ConvolutionalNetwork


@dataclass(frozen=True)
class RunInput:
    """What a run trains and is evaluated on: prepared images (N, H, W) float32 and labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_inputs(settings: RunSettings, dataset: Dataset) -> RunInput:
    """The images of a run: all training and test images, or, with `validation`, a split of the training images.

    The split is the same for every run (seed 0), so that arms and rates are compared on the same images. With
    `training_images` arms of the same seed train on the same choice, and intervals over seeds cover the choice.
    """
    data = settings.data
    some = 0 < data.training_images < len(dataset.train_labels) - data.validation
    # Which images are chosen depends on the seed only where not all are.
    choice = (data.training_images, settings.seed) if some else None
    return _prepare_once(dataset, data.validation, choice, data.binarize)


@lru_cache(maxsize=1)
def _prepare_once(dataset: Dataset, validation: int, choice: tuple[int, int] | None, binarize: bool) -> RunInput:
    """A worker's runs mostly have the same images: it makes them ready once. They are only read."""
    parts = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    if validation:
        parts = hold_out(dataset.train_images, dataset.train_labels, validation, seed=0)
    if choice:
        parts = (*hold_out(parts[0], parts[1], *choice)[2:], *parts[2:])
    return RunInput(prepare_images(parts[0], binarize), parts[1], prepare_images(parts[2], binarize), parts[3])


def build_network(settings: RunSettings, dataset: Dataset) -> Network:
    """The untrained network of a run; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = build(dataset.train_images.shape[1:], len(dataset.class_names), settings.network)
        network.first_pattern = settings.seed * 1_000_003
        return network


@dataclass
class _State:
    """All that changes during a run; what a checkpoint holds."""

    step: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)


def _save_checkpoint(path: Path, state: _State, network: Network, optimizer: torch.optim.Optimizer, run: str) -> None:
    buffer = io.BytesIO()
    content = {
        "run": run,
        "step": state.step,
        "seconds": state.seconds,
        "processor_seconds": state.processor_seconds,
        "metrics": json.dumps(state.metrics),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(content, buffer)
    data = buffer.getvalue()
    write_bytes(path, hashlib.sha256(data).digest() + data)


def _load_checkpoint(path: Path, network: Network, optimizer: torch.optim.Optimizer, run: str) -> _State:
    """Bring network, optimizer and random numbers to where the checkpoint is; a fresh state if it is of no use."""
    try:
        data = path.read_bytes()
    except OSError:
        return _State()
    # Damaged, or of an earlier batchlab.
    if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
        return _State()
    content = torch.load(io.BytesIO(data[DIGEST:]), weights_only=True)
    # Another version of torch, of the data or of batchlab would not end the same: such a run starts again.
    if content["run"] != run:
        return _State()
    network.load_state_dict(content["network"])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["random"])
    seconds = content["seconds"], content["processor_seconds"]
    return _State(content["step"], *seconds, json.loads(content["metrics"]))


def _measure(
    settings: RunSettings,
    network: Network,
    optimizer: torch.optim.Optimizer,
    inputs: RunInput,
    step: int,
    train_loss: float | None,
) -> dict[str, Any]:
    loss, accuracy = evaluate(network, inputs.held_out_images, inputs.held_out_labels)
    line: dict[str, Any] = {"step": step, "train_loss": train_loss, "loss": loss, "accuracy": accuracy}
    if settings.training_errors:
        right = evaluate(network, inputs.train_images, inputs.train_labels)[1]
        line["training_errors"] = round((1 - right) * len(inputs.train_labels))
    if settings.probe_units:
        probe = inputs.held_out_images[: PROBE_IMAGES - PROBE_IMAGES % settings.batch_size]
        line["percentiles"] = activation_percentiles(network, probe, settings.batch_size, settings.probe_units)
    if settings.landscape:
        coming = next(batch_order(len(inputs.train_labels), settings.batch_size, settings.seed, step, step + 1))
        batch = inputs.train_images[coming], inputs.train_labels[coming]
        rate = learning_rate(settings.optimizer, min(step, settings.steps - 1), settings.steps)
        line["landscape"] = landscape(network, optimizer, *batch, rate)
    return line


def _inference_accuracies(settings: RunSettings, network: Network, inputs: RunInput) -> dict[str, float]:
    """What the same weights score with running averages, with recalibrated statistics (Algorithm 2), and folded."""
    images, labels = inputs.held_out_images, inputs.held_out_labels
    scores = {"running_average": evaluate(network, images, labels)[1]}
    if not network.statistics_layers():
        return scores
    usable = len(inputs.train_images) // settings.batch_size * settings.batch_size
    recalibrate(network, inputs.train_images[:usable].split(settings.batch_size))
    scores["recalibrated"] = evaluate(network, images, labels)[1]
    folded, report = fold(network, images[: settings.batch_size])
    if report.refused:
        raise RuntimeError(f"the study's own network could not be folded:\n{report}")
    scores["folded"] = evaluate(folded, images, labels)[1]
    with torch.no_grad():
        network.eval()
        scores["folded_difference"] = float((folded(images) - network(images)).abs().max())
    return scores


def _weights(network: Network) -> bytes:
    return save_safetensors({name: value.contiguous() for name, value in network.state_dict().items()})


def _lines(metrics: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in metrics)


def run(
    settings: RunSettings,
    dataset: Dataset,
    folder: Path,
    on_evaluation: Callable[[int], None] | None = None,
    checkpoint_seconds: float = 5.0,
) -> None:
    """Train as the settings say and leave a run record in `folder`; go on where an earlier, interrupted call stopped.

    A finished folder is left as it is. Killed at any moment and called again, the run ends with the same metrics and
    weights, bit for bit, as one that was never interrupted (same versions, same processor, one thread).

    Args:
        settings: of the run.
        dataset: the one the settings name.
        folder: made if missing.
        on_evaluation: called with the number of steps done after each evaluation.
        checkpoint_seconds: at least this long between two checkpoints, which are made after evaluations.

    Raises:
        ValueError: the folder holds a run with other settings or other data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "run", patience=60), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # of dropout; first weights and order of images have seeds of their own
        _run_locked(settings, dataset, folder, on_evaluation, checkpoint_seconds)


def _refuse_mixture(folder: Path, earlier: Any, record: dict[str, Any]) -> None:
    old, new = earlier.get("settings", {}), record["settings"]
    # A record from before a setting existed was made with what is now its default.
    if to_dict(from_dict(old, RunSettings)) != new:
        raise ValueError(
            f"{folder} holds a run with other settings ({old}, not {new}): choose another folder, or delete that one"
        )
    if earlier.get("data", {}).get("checksum") != record["data"]["checksum"]:
        raise ValueError(
            f"{folder} holds a run on other data ({earlier.get('data', {}).get('description')}, not "
            f"{record['data']['description']}): choose another folder, or delete that one"
        )


def _run_locked(
    settings: RunSettings,
    dataset: Dataset,
    folder: Path,
    on_evaluation: Callable[[int], None] | None,
    checkpoint_seconds: float,
) -> None:
    record = describe_run(settings, dataset)
    if (folder / "run.json").is_file():
        _refuse_mixture(folder, read_json(folder / "run.json"), record)
    if (folder / "result.json").is_file():
        (folder / "checkpoint.pt").unlink(missing_ok=True)  # killed just before its removal
        return

    inputs = load_inputs(settings, dataset)
    network = build_network(settings, dataset)
    optimizer = make_optimizer(network, settings.optimizer, inputs.train_images)
    identity = json.dumps([record["settings"], dataset.checksum, record["environment"]], sort_keys=True)
    prepare(network, settings.network, inputs.train_images)
    first = inputs.train_images[:SIGNAL_IMAGES], inputs.train_labels[:SIGNAL_IMAGES]
    start = {"signal": signals(network, *first)} if settings.signal else {}
    state = _load_checkpoint(folder / "checkpoint.pt", network, optimizer, identity)
    follow(network, settings.network, optimizer, state.step)
    write_json(folder / "run.json", record)
    write_text(folder / "metrics.jsonl", _lines(state.metrics))
    status, saved_at = "finished", time.perf_counter()
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        for goal in evaluation_steps(settings.steps, settings.spacing, settings.evaluate_every):
            if goal < state.step or (state.metrics and goal == state.step):
                continue
            order = batch_order(len(inputs.train_labels), settings.batch_size, settings.seed, state.step, goal)
            started = time.perf_counter(), time.thread_time()
            train_loss = train(
                network,
                optimizer,
                settings.optimizer,
                inputs.train_images,
                inputs.train_labels,
                order,
                state.step,
                settings.steps,
                settings.network.dropout.patterns,
            )
            state.seconds += time.perf_counter() - started[0]
            state.processor_seconds += time.thread_time() - started[1]
            state.step = goal
            if not math.isfinite(train_loss):
                status = "diverged"
                break
            line = _measure(settings, network, optimizer, inputs, goal, train_loss if goal else None)
            if not math.isfinite(line["loss"]):  # the last step was the one too far, and no mean of losses shows it
                status = "diverged"
                break
            state.metrics.append(line)
            stream.write(_lines(state.metrics[-1:]))
            stream.flush()
            if on_evaluation is not None:
                on_evaluation(goal)
            if time.perf_counter() - saved_at > checkpoint_seconds:
                _save_checkpoint(folder / "checkpoint.pt", state, network, optimizer, identity)
                saved_at = time.perf_counter()
    _finish(settings, dataset, network, inputs, folder, state, start | {"status": status})


def _weight_growth(settings: RunSettings, dataset: Dataset, network: Network, inputs: RunInput) -> dict[str, float]:
    start = build_network(settings, dataset)
    prepare(start, settings.network, inputs.train_images)
    first, last = weight_lengths(start), weight_lengths(network)
    growth = {name: last[name] / first[name] for name in first if first[name]}
    return {name: float(f"{value:.6g}") for name, value in growth.items() if math.isfinite(value)}


def _finish(
    settings: RunSettings,
    dataset: Dataset,
    network: Network,
    inputs: RunInput,
    folder: Path,
    state: _State,
    known: dict[str, Any],
) -> None:
    """Write what remains; result.json last, because its presence says that the rest is there."""
    weights = _weights(network)
    result: dict[str, Any] = known | {"steps": state.step, "evaluations": len(state.metrics)}
    if result["status"] == "finished":
        result["accuracy"] = state.metrics[-1]["accuracy"]
        if settings.variance_shift:  # before the statistics are recalibrated
            result["variance_shift"] = variance_shifts(network, inputs.train_images)
            result["expected_shift"] = expected_shifts(network, inputs.train_images)
            result["mean_shift"] = mean_shifts(network, inputs.train_images)
        if slopes := learned_slopes(network):
            result["slopes"] = slopes
        if settings.weight_growth:
            result["weight_growth"] = _weight_growth(settings, dataset, network, inputs)
        if settings.inference:
            result["inference"] = _inference_accuracies(settings, network, inputs)
    result["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    write_text(folder / "metrics.jsonl", _lines(state.metrics))
    write_bytes(folder / "weights.safetensors", weights)
    # A core that other work shares makes a run longer, but hardly makes it need more of the processor.
    seconds = {"training_seconds": state.seconds, "processor_seconds": state.processor_seconds}
    write_json(folder / "timing.json", {name: round(value, 3) for name, value in seconds.items()})
    write_json(folder / "result.json", result)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


@cache
def _end_with_parent() -> None:
    """End this process when the one that started it is gone; once in a process.

    A killed study leaves its workers behind, which would train on, and hold its output open, for nobody. Nothing is
    lost: the study's rerun continues from their checkpoints.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _load_once(name: str, folder: Path | None) -> Dataset:
    """A worker does many runs on one data set: it reads and verifies the files once."""
    return load_dataset(name, folder, download=False)


def execute(
    settings: RunSettings, folder: Path, data_folder: Path | None, checksum: str, in_worker: bool = False
) -> None:
    """Do one run of a plan, as a worker process does it: with its own copy of the data and one thread.

    Args:
        settings: of the run.
        folder: where its record goes.
        data_folder: what the caller passed to `load_dataset`.
        checksum: of the data that the caller loaded; the worker must find the same.
        in_worker: in a process of its own: Ctrl-C is the parent's to handle, and without a parent it stops.
    """
    if in_worker:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _end_with_parent()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dataset = _load_once(settings.data.dataset, data_folder)
        if dataset.checksum != checksum:
            raise ValueError("the data changed while the study was running: start it again")
        run(settings, dataset, folder)
    finally:
        torch.set_num_threads(threads)
