"""Settings of the study dropout-speed, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from batchlab.lab.settings import SettingsError

__all__ = ["SIZES", "DropoutSpeedSettings"]


@dataclass(frozen=True)
class DropoutSpeedSettings:
    """Graham, Reizenstein & Robinson 2015, Figure 1.

    Args:
        dataset: "mnist" or "fashion"; its images are the inputs, what they show makes no difference.
        widths: units of each hidden layer.
        batch_sizes: images in a training step.
        hidden_layers: the paper has three.
        input_rate: share of the inputs that is dropped.
        rate: share of the hidden units that is dropped.
        rounds: how many times each network has its turn at a width and batch size.
        turn_seconds: how long a turn of the fastest network lasts at least, in whole training steps.
        epoch_images: images of the epoch that times are given for.
    """

    dataset: str = "mnist"
    widths: tuple[int, ...] = (125, 250, 500, 1000, 2000, 4000)
    batch_sizes: tuple[int, ...] = (10, 100, 1000)
    hidden_layers: int = 3
    input_rate: float = 0.2
    rate: float = 0.5
    rounds: int = 21
    turn_seconds: float = 0.05
    epoch_images: int = 60_000

    def __post_init__(self) -> None:
        for name, values in (("widths", self.widths), ("batch_sizes", self.batch_sizes)):
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise SettingsError(f"{name} is {values}; allowed: one or more different numbers above 0")
        counts = {"hidden_layers": self.hidden_layers, "epoch_images": self.epoch_images}
        for name, value in counts.items():
            if value < 1:
                raise SettingsError(f"{name} is {value}; allowed: 1 or more")
        if self.rounds < 3:
            raise SettingsError(f"rounds is {self.rounds}; allowed: 3 or more, for there to be quartiles")
        if not 0 <= self.input_rate < 1:
            raise SettingsError(f"input_rate is {self.input_rate}; allowed: from 0 to below 1")
        if not 0 < self.rate < 1:
            raise SettingsError(f"rate is {self.rate}; allowed: above 0 and below 1")
        if not 0 < self.turn_seconds <= 60:
            raise SettingsError(f"turn_seconds is {self.turn_seconds}; allowed: above 0, at most 60")


SIZES: Final[dict[str, DropoutSpeedSettings]] = {
    "full": DropoutSpeedSettings(),
    "demo": DropoutSpeedSettings(widths=(125, 250, 500, 1000, 2000), batch_sizes=(100, 1000), rounds=11),
    "quick": DropoutSpeedSettings(widths=(125, 250, 500), batch_sizes=(100,), rounds=5, turn_seconds=0.01),
}
