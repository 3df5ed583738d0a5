"""Settings that studies have in common whose arms each get a learning rate of their own."""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.lab.settings import SettingsError

__all__ = ["SEARCH_SEED", "ComparisonSettings"]

SEARCH_SEED = 1000  # the search's seeds start this far above the final ones: no final run was chosen by its own luck


@dataclass(frozen=True)
class ComparisonSettings:
    """A search for each arm's learning rate, then the same seeds in every arm.

    Args:
        dataset: "mnist" or "fashion".
        steps: of each final run.
        seeds: final runs of each arm; the same seeds in every arm.
        first_seed: the smallest of them; another one repeats the whole study with other randomness.
        rates: first learning rates tried for each arm.
        search_steps: steps of each run of the search.
        search_seeds: runs of each arm and rate in the search; other seeds than the final ones.
        batch_size: images in a batch.
        held_out_share: share of the training images that the search validates on.

    Raises:
        SettingsError: a value that is not allowed.
    """

    dataset: str = "mnist"
    steps: int = 12_000
    seeds: int = 3
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    search_steps: int = 3_000
    search_seeds: int = 1
    batch_size: int = 100
    held_out_share: float = 1 / 6
    first_seed: int = 0

    def __post_init__(self) -> None:
        counts = {"seeds": self.seeds, "search_seeds": self.search_seeds, "search_steps": self.search_steps}
        for name, value in counts.items():
            if value < 1:
                raise SettingsError(f"{name} is {value}; it must be 1 or more")
        if self.seeds > SEARCH_SEED:
            raise SettingsError(f"seeds is {self.seeds}; allowed: 1 to {SEARCH_SEED} (the next are the search's)")
        if not 0 <= self.first_seed <= 1_000_000_000:
            raise SettingsError(f"first_seed is {self.first_seed}; allowed: 0 to 1,000,000,000")
        if not self.rates or len({f"{rate:g}" for rate in self.rates}) != len(self.rates):  # as folders are called
            raise SettingsError(
                f"rates is {self.rates}; it must name one or more learning rates, different in their first six digits"
            )
        if not 0 < self.held_out_share < 1:
            raise SettingsError(f"held_out_share is {self.held_out_share}; it must be between 0 and 1")

    @property
    def final_seeds(self) -> range:
        """The seeds of the final runs of every arm."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def seeds_of_search(self) -> range:
        """The seeds of every arm and rate in the search."""
        first = SEARCH_SEED + self.first_seed
        return range(first, first + self.search_seeds)

    def rates_of(self, arm: str) -> tuple[float, ...]:  # noqa: ARG002
        """The rates tried for an arm: `rates`, unless a study says otherwise."""
        return self.rates
