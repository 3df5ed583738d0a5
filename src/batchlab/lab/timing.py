"""Times of candidates that take turns, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from statistics import quantiles
from typing import Any

import torch

__all__ = ["Quartiles", "calls_for", "one_thread", "quartiles", "ratio", "take_turns"]


@dataclass(frozen=True)
class Quartiles:
    """The middle of some measurements, and between which values the middle half of them lies."""

    low: float
    median: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median, third quartile; of one value three times that.

    >>> quartiles([3.0, 1.0, 2.0])
    Quartiles(low=1.0, median=2.0, high=3.0)
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*quantiles(values, n=4))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Quartiles:
    """Quartiles of numerator / denominator, each pair from one round: what slows down a round slows down both.

    >>> ratio([2.0, 6.0, 4.0], [1.0, 3.0, 2.0])
    Quartiles(low=2.0, median=2.0, high=2.0)
    """
    return quartiles([a / b for a, b in zip(numerators, denominators, strict=True)])


def take_turns(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    calls: int = 1,
    warm_up: int = 1,
    untimed: int = 0,
    on_round: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one call of each candidate, a list with one entry a round; in each round the order is drawn anew.

    Args:
        candidates: what to call, by name.
        rounds: how many times each one has its turn.
        calls: in a row at each turn; the time is their mean. The clock's own cost disappears in enough of them.
        warm_up: calls of each before the first round.
        untimed: calls at the beginning of each turn that do not count. 0: what is timed finds the caches as another
            candidate left them; enough: as it leaves them itself, like a program that has no other.
        on_round: called after each round.
    """
    for work in candidates.values():
        for _ in range(warm_up):
            work()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    shuffle = Random(0).shuffle  # the same order in every run
    names = list(candidates)
    for _ in range(rounds):
        # Caches are left as the one before had use of them: nobody always follows the same other.
        shuffle(names)
        for name in names:
            work = candidates[name]
            for _ in range(untimed):
                work()
            started = time.perf_counter()
            for _ in range(calls):
                work()
            times[name].append((time.perf_counter() - started) / calls)
        if on_round is not None:
            on_round()
    return times


def calls_for(candidates: Mapping[str, Callable[[], Any]], seconds: float, warm_up: int = 2) -> tuple[int, float]:
    """How many calls make a turn of the fastest candidate last about `seconds`, and how long a round then takes.

    The first calls allocate, and decide what is decided once: `warm_up` of each come before, and are not counted.
    """
    for work in candidates.values():
        for _ in range(warm_up):
            work()
    times = [values[0] for values in take_turns(candidates, 1, warm_up=0).values()]
    calls = max(1, round(seconds / max(min(times), 1e-9)))
    return calls, calls * sum(times)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch uses one thread while the body runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
