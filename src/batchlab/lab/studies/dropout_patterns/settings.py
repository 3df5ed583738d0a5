"""Settings of the study dropout-patterns, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from batchlab.lab.settings import DropoutSettings, SettingsError

__all__ = ["SIZES", "DropoutPatternsSettings", "arms", "label"]


@dataclass(frozen=True)
class DropoutPatternsSettings:
    """Batchwise dropout with exact counts, with independent units, and with few patterns (papers §2.3 and §2.6).

    Args:
        dataset: "mnist" or "fashion".
        steps: of each final run.
        seeds: final runs of each arm; the same seeds in every arm.
        patterns: numbers of different patterns, used in turn; besides a new one for each batch.
        rates: first learning rates tried for each arm.
        search_steps: steps of each run of the search.
        search_seeds: runs of each arm and rate in the search; other seeds than the final ones.
        batch_size: images in a batch, which share a pattern.
        widths: units of each hidden layer.
        input_dropout: share of the pixels that is dropped.
        hidden_dropout: share of the hidden units that is dropped.
        momentum: Nesterov's.
        final: last learning rate as a share of the first, reached exponentially.
        held_out_share: share of the training images that the search validates on.
        evaluate_every: steps between evaluations.
    """

    dataset: str = "mnist"
    steps: int = 12_000
    seeds: int = 3
    patterns: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 1024)
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    search_steps: int = 3_000
    search_seeds: int = 1
    batch_size: int = 100
    widths: tuple[int, ...] = (800, 800)
    input_dropout: float = 0.2
    hidden_dropout: float = 0.5
    momentum: float = 0.9
    final: float = 0.135
    held_out_share: float = 1 / 6
    evaluate_every: int = 600

    def __post_init__(self) -> None:
        counts = {"seeds": self.seeds, "search_seeds": self.search_seeds, "search_steps": self.search_steps}
        for name, value in (counts | {"evaluate_every": self.evaluate_every}).items():
            if value < 1:
                raise SettingsError(f"{name} is {value}; it must be 1 or more")
        if self.seeds > 1000:
            raise SettingsError(f"seeds is {self.seeds}; allowed: 1 to 1000 (the search uses seeds from 1000 on)")
        if not self.rates or len(set(self.rates)) != len(self.rates):
            raise SettingsError(f"rates is {self.rates}; it must name one or more different learning rates")
        if not self.patterns or min(self.patterns) < 1 or len(set(self.patterns)) != len(self.patterns):
            raise SettingsError(f"patterns is {self.patterns}; it must name one or more different numbers above 0")
        if not 0 < self.held_out_share < 1:
            raise SettingsError(f"held_out_share is {self.held_out_share}; it must be between 0 and 1")


def arms(settings: DropoutPatternsSettings) -> dict[str, DropoutSettings]:
    """The dropout of each arm, by its name."""
    share = (settings.input_dropout, settings.hidden_dropout)
    found = {"exact": DropoutSettings("batchwise", *share), "bernoulli": DropoutSettings("batchwise_bernoulli", *share)}
    limited = {f"patterns{n}": DropoutSettings("batchwise", *share, patterns=n) for n in sorted(settings.patterns)}
    return found | limited


def label(name: str) -> str:
    """An arm in words."""
    named = {"exact": "a new pattern each batch, exact count", "bernoulli": "a new pattern each batch, Bernoulli"}
    if name in named:
        return named[name]
    number = int(name.removeprefix("patterns"))
    return f"{number:,} {'pattern' if number == 1 else 'patterns'}, exact count"


SIZES: Final[dict[str, DropoutPatternsSettings]] = {
    "full": DropoutPatternsSettings(),
    "demo": DropoutPatternsSettings(steps=3_000, patterns=(1, 4, 16, 256), rates=(0.1, 0.3), search_steps=900),
    "quick": DropoutPatternsSettings(
        steps=400, seeds=3, patterns=(1, 16), rates=(0.1,), search_steps=40, widths=(400, 400), evaluate_every=40
    ),
}
