"""Settings of a run: frozen dataclasses, read from and written to TOML and JSON; unknown keys are errors."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import cattrs
import tomli_w
from cattrs import transform_error
from cattrs.v import format_exception

__all__ = [
    "ALGORITHMS",
    "INITIALIZATIONS",
    "POSITIONS",
    "SCHEDULES",
    "DataSettings",
    "DropoutSettings",
    "NetworkSettings",
    "OptimizerSettings",
    "RunSettings",
    "SettingsError",
    "from_dict",
    "read_settings",
    "to_dict",
    "write_settings",
]

ALGORITHMS: Final = ("sgd", "submatrix_sgd", "path_sgd")

INITIALIZATIONS: Final = ("gaussian", "xavier", "he")

POSITIONS: Final = ("hidden", "before_normalization", "last")

SCHEDULES: Final = ("constant", "linear", "cosine", "exponential")

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting has an unknown name, a wrong type or a value that is not allowed; the message names its path."""


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise SettingsError(f"{name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they enter the network.

    Args:
        dataset: "mnist" or "fashion".
        binarize: pixels become 0 or 1, at half of the brightness (the paper's binary images); else they are divided
            by 255.
        validation: how many training images are held out, stratified, and evaluated on. 0: train on all training
            images and evaluate on the test images.
        training_images: train on this many of them, stratified, another choice for each seed; 0, or more than there
            are: on all.
    """

    dataset: str = "mnist"
    binarize: bool = True
    validation: int = 0
    training_images: int = 0

    def __post_init__(self) -> None:
        _require(self.dataset in ("mnist", "fashion"), "dataset", self.dataset, "'mnist', 'fashion'")
        _require(self.validation >= 0, "validation", self.validation, "0 (evaluate on test images) or a count")
        _require(self.training_images >= 0, "training_images", self.training_images, "0 (all) or a count")


@dataclass(frozen=True)
class DropoutSettings:
    """Which dropout a network has, and how much of it.

    Args:
        kind: name of the mechanism, see `batchlab.lab.mechanisms.DROPOUTS`.
        input: share of the inputs that is dropped.
        hidden: share of each hidden layer's units that is dropped.
        patterns: how many different patterns there are, used in turn by the batches; 0: a new one for each batch.
        position: of the hidden dropouts: "hidden", behind each layer's activation; "before_normalization", between
            each layer and its normalization; "last", behind the last hidden layer's activation alone.
    """

    kind: str = "none"
    input: float = 0.2
    hidden: float = 0.5
    patterns: int = 0
    position: str = "hidden"

    def __post_init__(self) -> None:
        _require(0 <= self.input < 1, "dropout.input", self.input, "from 0 to below 1")
        _require(0 <= self.hidden < 1, "dropout.hidden", self.hidden, "from 0 to below 1")
        _require(self.patterns >= 0, "dropout.patterns", self.patterns, "0 (a new one each batch) or a count")
        _require(
            self.patterns == 0 or self.kind.startswith("batchwise"),
            "dropout.patterns",
            self.patterns,
            f"0 for {self.kind!r}: only batchwise dropout has patterns to repeat",
        )
        _require(self.position in POSITIONS, "dropout.position", self.position, ", ".join(POSITIONS))


@dataclass(frozen=True)
class NetworkSettings:
    """A multilayer perceptron, or a convolutional network; see `batchlab.lab.networks`.

    Args:
        widths: units of each hidden layer.
        activation: name of the nonlinearity, see `batchlab.lab.mechanisms.ACTIVATIONS`.
        normalization: name of the mechanism before it, see `batchlab.lab.mechanisms.NORMALIZATIONS`.
        weight_std: standard deviation of the initial Gaussian weights; 0: weights uniform within ±1/√(inputs), and
            zeros in the last layer, as in the code of Graham et al. (2015).
        dropout: of inputs and hidden units.
        initialization: "gaussian", with `weight_std`; or Gaussian with n Var[w] = 1 ("xavier"), or with
            n Var[w] = 2/(1 + a²), a the slope of the rectifier in front of a layer ("he"), n its inputs.
        factorization: how every linear and convolution layer holds its weight, see
            `batchlab.lab.mechanisms.FACTORIZATIONS`.
        data_start: give every factored unit mean 0 and deviation 1 on a first batch.
        refresh_every: steps between two refreshes of natural layers.
        natural_eps: added to the covariance that natural layers whiten by.
        channels: of 3x3 convolutions in front of the hidden layers, each with a 2x2 max pooling; (): none, a
            multilayer perceptron.
    """

    widths: tuple[int, ...] = (100, 100, 100)
    activation: str = "sigmoid"
    normalization: str = "none"
    weight_std: float = 0.1
    dropout: DropoutSettings = field(default_factory=DropoutSettings)
    initialization: str = "gaussian"
    factorization: str = "none"
    data_start: bool = False
    refresh_every: int = 100
    natural_eps: float = 1e-3
    channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(bool(self.widths) and min(self.widths) > 0, "widths", self.widths, "one or more positive numbers")
        _require(self.weight_std >= 0, "weight_std", self.weight_std, "above 0, or 0 for uniform weights")
        names = ", ".join(INITIALIZATIONS)
        _require(self.initialization in INITIALIZATIONS, "initialization", self.initialization, names)
        factored = self.factorization not in ("none", "natural", "spectral_norm")
        _require(
            factored or not self.data_start,
            "data_start",
            self.data_start,
            f"False for factorization {self.factorization!r}, which has no gains to start from data",
        )
        _require(self.refresh_every > 0, "refresh_every", self.refresh_every, "1 or more steps")
        _require(self.natural_eps > 0, "natural_eps", self.natural_eps, "above 0")
        _require(not self.channels or min(self.channels) > 0, "channels", self.channels, "positive numbers")
        _require(
            not self.channels or self.factorization != "natural",
            "factorization",
            self.factorization,
            "any but 'natural' for a convolutional network: natural coordinates are for linear layers",
        )


@dataclass(frozen=True)
class OptimizerSettings:
    """Stochastic gradient descent with momentum and a learning-rate schedule.

    Args:
        learning_rate: of the first step.
        momentum: share of the last update that is kept.
        nesterov: look ahead along the momentum.
        weight_decay: L2 coefficient on all parameters.
        schedule: "constant"; or from `learning_rate` to `learning_rate · final` by a "linear", "cosine" or
            "exponential" law over the run.
        final: the last learning rate as a share of the first.
        algorithm: "sgd"; "submatrix_sgd", which changes only what batchwise dropout kept; or "path_sgd", for ReLU
            networks without normalization.
    """

    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "constant"
    final: float = 0.01
    algorithm: str = "sgd"

    def __post_init__(self) -> None:
        _require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate), "learning_rate", self.learning_rate, "above 0"
        )
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "from 0 to below 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, ", ".join(SCHEDULES))
        _require(0 < self.final <= 1, "final", self.final, "above 0, at most 1")
        _require(self.algorithm in ALGORITHMS, "algorithm", self.algorithm, ", ".join(ALGORITHMS))
        plain = not self.nesterov and not self.weight_decay
        _require(
            plain or self.algorithm != "path_sgd",
            "algorithm",
            self.algorithm,
            "sgd or submatrix_sgd with nesterov or weight_decay, which Path-SGD does not have",
        )


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a run; with the data and the versions in its record it can be repeated bit for bit.

    Args:
        steps: number of parameter updates.
        batch_size: images in each; an epoch's last, smaller batch is left out.
        seed: of the initial weights and of the order of the images; arms with the same seed share both.
        spacing: how far apart evaluations are, as a share of the steps done: 0.05 evaluates every 5 %.
        probe_units: for how many units of the last hidden layer the percentiles of the input are recorded.
        evaluate_every: steps between evaluations; 0: as `spacing` says.
        training_errors: whether each evaluation counts the training images that are recognized wrongly, too.
        variance_shift: whether the end of the run records, for each batch norm, how far the variance and the mean
            that it normalizes by are from those that it meets in evaluation, and how far dropout in front explains.
        landscape: whether each evaluation measures how far the next step shifts what each layer gets, and how the loss
            behaves along the gradient, see `batchlab.lab.landscape`; training is the same to the last bit.
        weight_growth: whether the end of the run records how many times each layer's weights have grown.
        inference: whether the end of the run records what a network with batch norms scores with recalibrated
            statistics, and folded.
        signal: whether the record has what enters each hidden nonlinearity before the first step, see
            `batchlab.lab.measures.signals`.
    """

    data: DataSettings = field(default_factory=DataSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    steps: int = 50_000
    batch_size: int = 60
    seed: int = 0
    spacing: float = 0.05
    probe_units: int = 5
    evaluate_every: int = 0
    training_errors: bool = False
    variance_shift: bool = False
    landscape: bool = False
    weight_growth: bool = False
    inference: bool = True
    signal: bool = False

    def __post_init__(self) -> None:
        _require(self.steps > 0, "steps", self.steps, "above 0")
        _require(self.batch_size > 1, "batch_size", self.batch_size, "2 or more")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "0 to 2147483647")
        _require(0 < self.spacing <= 1, "spacing", self.spacing, "above 0, at most 1")
        _require(self.evaluate_every >= 0, "evaluate_every", self.evaluate_every, "0 (by spacing) or a number of steps")
        _require(
            0 <= self.probe_units <= self.network.widths[-1],
            "probe_units",
            self.probe_units,
            f"0 to {self.network.widths[-1]}, the units of the last hidden layer",
        )
        plain = self.network.dropout.kind == "none" and self.network.factorization == "none"
        _require(
            not self.landscape or (plain and self.optimizer.algorithm == "sgd"),
            "landscape",
            self.landscape,
            "False with dropout, with factored layers and with another algorithm than sgd",
        )
        # Looking must not draw the random numbers that training would have drawn.
        _require(not self.signal or self.network.dropout.kind == "none", "signal", self.signal, "False with dropout")


_converter = cattrs.Converter(forbid_extra_keys=True)


def _strict(kind: type, also: tuple[type, ...] = ()) -> None:
    """Take only values that are what they should be: "3", 3.7 or true are no integers."""

    def structure(value: Any, _: Any) -> Any:
        if isinstance(value, (kind, *also)) and not (kind is not bool and isinstance(value, bool)):
            return kind(value)
        raise ValueError(f"{value!r} is not of type {kind.__name__}")

    _converter.register_structure_hook(kind, structure)


for _kind, _also in ((int, ()), (float, (int,)), (str, ()), (bool, ())):
    _strict(_kind, _also)


def _explain(error: BaseException, kind: type | None) -> str:
    """What is wrong in one place; our own errors say it themselves."""
    return str(error) if isinstance(error, ValueError) else format_exception(error, kind)


def from_dict(values: Mapping[str, Any], kind: type[T]) -> T:
    """Build the settings dataclass `kind` from nested plain values.

    Raises:
        SettingsError: an unknown key, a wrong type or a value that is not allowed; names the path of each.

    >>> from_dict({"network": {"widths": [50]}, "probe_units": 0}, RunSettings).network.widths
    (50,)
    """
    try:
        return _converter.structure(values, kind)
    except Exception as error:
        raise SettingsError("; ".join(transform_error(error, "settings", _explain))) from error


def to_dict(settings: Any) -> dict[str, Any]:
    """Nested plain values of a settings dataclass, ready for TOML or JSON."""
    values: dict[str, Any] = json.loads(json.dumps(_converter.unstructure(settings)))
    return values


def read_settings(path: Path, kind: type[T]) -> T:
    """Read settings from a .toml or .json file.

    Raises:
        SettingsError: not readable as TOML or JSON, or the content does not fit `kind`; names the file and the path.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read settings from {path}: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold a table of settings, not {type(values).__name__}")
    try:
        return from_dict(values, kind)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def write_settings(settings: Any, path: Path) -> None:
    """Write settings to a .toml or .json file that `read_settings` reads back."""
    values = to_dict(settings)
    text = json.dumps(values, indent=2) + "\n" if path.suffix == ".json" else tomli_w.dumps(values)
    path.write_text(text, encoding="utf-8")
