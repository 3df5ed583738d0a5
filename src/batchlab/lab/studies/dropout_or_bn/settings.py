"""Settings of the study dropout-or-bn, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from batchlab.lab.settings import SettingsError
from batchlab.lab.studies.settings import ComparisonSettings

__all__ = ["SIZES", "DropoutOrBnSettings"]

_TARGETS: Final = {"mnist": (0.07, 0.06, 0.05), "fashion": (0.18, 0.17, 0.16)}


@dataclass(frozen=True)
class DropoutOrBnSettings(ComparisonSettings):
    """Batch norm, dropout, both and neither, with dropout at three places (Li et al. 2018).

    Args:
        rates: first learning rates tried for each arm.
        training_images: train on this many images, another choice for each seed, so that there is something to
            overfit; 0: on all.
        widths: of the multilayer perceptron.
        shares: of the hidden units that dropout takes; the last is the one that the answer is about, and batchwise
            dropout's.
        channels: of the convolutional network; (): without it.
        channel_widths: of its hidden layers.
        channel_share: of feature maps and of hidden units that dropout takes there.
        momentum: Nesterov's.
        final: last learning rate as a share of the first, reached linearly.
        evaluate_every: steps between evaluations.
        targets: test errors to reach; empty: 7, 6 and 5 % (18, 17 and 16 % for fashion).
    """

    steps: int = 1_500
    seeds: int = 5
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    search_steps: int = 500
    training_images: int = 5_000
    widths: tuple[int, ...] = (800, 800)
    shares: tuple[float, ...] = (0.2, 0.5)
    channels: tuple[int, ...] = (8, 16)
    channel_widths: tuple[int, ...] = (128,)
    channel_share: float = 0.2
    momentum: float = 0.9
    final: float = 0.01
    evaluate_every: int = 100
    targets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.widths) < 2:
            raise SettingsError(
                f"widths is {self.widths}; two or more hidden layers, or no batch norm is behind dropout"
            )
        if len(self.shares) not in (1, 2) or any(not 0 < share < 1 for share in self.shares):
            raise SettingsError(f"shares is {self.shares}; it must name one or two shares between 0 and 1")
        if len(set(self.shares)) != len(self.shares):
            raise SettingsError(f"shares is {self.shares}; the two must be different")
        if not 0 < self.channel_share < 1:
            raise SettingsError(f"channel_share is {self.channel_share}; it must be between 0 and 1")
        if self.evaluate_every < 1:
            raise SettingsError(f"evaluate_every is {self.evaluate_every}; it must be 1 or more")
        if not self.targets:
            object.__setattr__(self, "targets", _TARGETS.get(self.dataset, ()))
        if not self.targets or any(not 0 < target < 1 for target in self.targets):
            raise SettingsError(f"targets is {self.targets}; it must name errors between 0 and 1")


SIZES: Final[dict[str, DropoutOrBnSettings]] = {
    "full": DropoutOrBnSettings(),
    "demo": DropoutOrBnSettings(
        steps=800,
        seeds=3,
        rates=(0.03, 0.1, 0.3),
        search_steps=250,
        training_images=2_000,
        widths=(400, 400),
        shares=(0.5,),
        channel_widths=(64,),
    ),
    "quick": DropoutOrBnSettings(
        steps=150,
        seeds=2,
        rates=(0.1,),
        search_steps=20,
        training_images=1_000,
        widths=(200, 200),
        shares=(0.5,),
        channels=(),
        evaluate_every=50,
    ),
}
