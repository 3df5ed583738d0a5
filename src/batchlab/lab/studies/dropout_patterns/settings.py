"""Settings of the study dropout-patterns, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from batchlab.lab.settings import DropoutSettings, SettingsError
from batchlab.lab.studies.settings import ComparisonSettings

__all__ = ["SIZES", "DropoutPatternsSettings", "dropouts", "label", "legend"]


@dataclass(frozen=True)
class DropoutPatternsSettings(ComparisonSettings):
    """Batchwise dropout with exact counts, with independent units, and with few patterns (papers §2.3 and §2.6).

    Args:
        patterns: numbers of different patterns, used in turn; besides a new one for each batch.
        widths: units of each hidden layer.
        input_dropout: share of the pixels that is dropped.
        hidden_dropout: share of the hidden units that is dropped.
        momentum: Nesterov's.
        final: last learning rate as a share of the first, reached exponentially.
        evaluate_every: steps between evaluations.
    """

    patterns: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 1024)
    widths: tuple[int, ...] = (800, 800)
    input_dropout: float = 0.2
    hidden_dropout: float = 0.5
    momentum: float = 0.9
    final: float = 0.135
    evaluate_every: int = 600

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate_every < 1:
            raise SettingsError(f"evaluate_every is {self.evaluate_every}; it must be 1 or more")
        if not self.patterns or min(self.patterns) < 1 or len(set(self.patterns)) != len(self.patterns):
            raise SettingsError(f"patterns is {self.patterns}; it must name one or more different numbers above 0")


def dropouts(settings: DropoutPatternsSettings) -> dict[str, DropoutSettings]:
    """The dropout of each arm, by its name."""
    share = (settings.input_dropout, settings.hidden_dropout)
    found = {"exact": DropoutSettings("batchwise", *share), "bernoulli": DropoutSettings("batchwise_bernoulli", *share)}
    limited = {f"patterns{n}": DropoutSettings("batchwise", *share, patterns=n) for n in sorted(settings.patterns)}
    return found | limited


def legend(name: str) -> str:
    """An arm in a few words, for figures."""
    named = {"exact": "new each batch, exact", "bernoulli": "new each batch, Bernoulli"}
    return named.get(name) or label(name).removesuffix(", exact count")


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
