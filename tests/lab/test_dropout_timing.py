"""What the speed comparisons build, count and say; none of these tests depends on how fast anything is."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from batchlab.lab.break_even import DropoutTimes, break_even, break_evens, measure, reading
from batchlab.lab.dropout_timing import (
    CONVOLUTIONAL,
    KINDS,
    Network,
    TrainingStep,
    build,
    held_bytes,
    mlp,
    parameter_bytes,
    random_batches,
    step_flops,
)
from batchlab.lab.memory import held_for_backward, peak_growth
from batchlab.lab.timing import Quartiles, calls_for, one_thread, quartiles, ratio, take_turns

SMALL_CONV = replace(CONVOLUTIONAL, sizes=(3, 8, 12, 16, 20, 10))


@pytest.mark.parametrize("network", [mlp((24, 16)), SMALL_CONV], ids=["mlp", "conv"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_of_each_kind_trains(network: Network, kind: str) -> None:
    images, labels = random_batches(network, 12)
    step = TrainingStep(network, kind, images, labels, 6)
    before = [parameter.clone() for parameter in step.model.parameters()]
    for _ in range(3):
        step()
    changed = [bool((a != b).any()) for a, b in zip(before, step.model.parameters(), strict=True)]
    assert all(changed)
    assert all(bool(parameter.isfinite().all()) for parameter in step.model.parameters())


def test_networks_have_the_sizes_of_the_comparison() -> None:
    def shapes(network: Network, kind: str) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for p in build(network, kind).parameters() if p.ndim > 1]

    assert shapes(mlp((800, 800)), "independent") == [(800, 784), (800, 800), (10, 800)]
    assert shapes(mlp((800, 800)), "small") == [(400, 627), (400, 400), (10, 400)]
    whole = [(128, 3, 3, 3), (256, 128, 2, 2), (384, 256, 2, 2), (512, 1536), (10, 512)]
    assert shapes(CONVOLUTIONAL, "batchwise") == whole
    assert shapes(CONVOLUTIONAL, "small") == [
        (64, 3, 3, 3),
        (128, 64, 2, 2),
        (192, 128, 2, 2),
        (256, 768),
        (10, 256),
    ]
    rates = [m.p for m in build(mlp((800, 800)), "independent") if isinstance(m, nn.Dropout)]
    assert rates == [0.2, 0.5, 0.5]
    assert build(CONVOLUTIONAL, "independent")(torch.zeros(1, 3, 24, 24)).shape == (1, 10)
    for network in (mlp((30, 20)), SMALL_CONV):
        assert parameter_bytes(network) == 4 * sum(p.numel() for p in build(network, "none").parameters())


def test_operations_are_those_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for network in (mlp((24, 16)), SMALL_CONV):
        images, labels = random_batches(network, 4)
        with FlopCounterMode(display=False) as counter:
            TrainingStep(network, "none", images, labels, 4)()
        assert counter.get_total_flops() == step_flops(network, 4)


def test_networks_and_batches_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="one rate fewer"):
        Network((3, 4), (0.1, 0.2))
    with pytest.raises(ValueError, match="must be linear"):
        Network((3, 4), (0.1,), (3,), 8)
    with pytest.raises(ValueError, match="'fast'; allowed: 'independent'"):
        build(mlp((4,)), "fast")
    with pytest.raises(ValueError, match="whole batches of 4"):
        TrainingStep(mlp((4,)), "none", torch.zeros(6, 784), torch.zeros(6, dtype=torch.int64), 4)


def test_rates_are_changed_behind_the_first_layer() -> None:
    images, labels = random_batches(mlp((40, 40)), 4)
    step = TrainingStep(mlp((40, 40)), "batchwise", images, labels, 4)
    step.set_rates(0.75)
    step()
    kept = [len(module.kept) for module in step.model if hasattr(module, "kept")]
    assert kept == [627, 10, 10]


def test_held_bytes_of_a_chain_are_counted_by_hand() -> None:
    batch, n = 8, 20
    network = mlp((n, n), input_rate=0.0)
    images, labels = random_batches(network, batch)
    held = {kind: held_bytes(TrainingStep(network, kind, images, labels, batch)) for kind in ("none", "independent")}
    hidden, output = 4 * batch * n, 4 * batch * 10  # two ReLUs' results; log-softmax saves its own
    assert held["none"].activations == 2 * hidden + output
    # Behind each ReLU dropout's result and its mask, which torch keeps in floats on the CPU.
    assert held["independent"].activations == held["none"].activations + 2 * (hidden + hidden)


def test_what_python_functions_keep_beside_saved_tensors_is_counted() -> None:
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.block = torch.zeros(100)
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0] * 2

    x = torch.zeros(5, 3, requires_grad=True)
    held = held_for_backward(lambda: Keeps.apply(x).sum(), [x], 5)
    assert (held.activations, held.weights) == (0, 400)
    assert held_for_backward(lambda: Keeps.apply(x + 0).sum(), [x], 5).activations == 60


def test_peak_growth_sees_what_is_allocated_and_freed_again() -> None:
    grown = peak_growth(lambda: torch.ones(50_000_000))
    if grown is None:
        pytest.skip("this system does not tell")
    assert 190e6 < grown < 260e6


def test_candidates_take_turns_and_each_follows_each_other_about_as_often() -> None:
    calls: list[str] = []
    rounds: list[int] = []
    work = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = take_turns(work, 60, calls=2, on_round=lambda: rounds.append(len(calls)))
    assert rounds == list(range(9, 369, 6))
    assert {name: len(values) for name, values in times.items()} == {"a": 60, "b": 60, "c": 60}
    assert calls[:3] == list("abc")
    order = "".join(calls[3:])
    assert all(sorted(order[at : at + 6]) == list("aabbcc") for at in range(0, 360, 6))
    turns = order[::2]
    assert order == "".join(2 * turn for turn in turns)  # two in a row
    behind = Counter(map("".join, pairwise(turns)))
    assert min(behind[first + second] for first in "abc" for second in "abc" if first != second) >= 15
    assert min(min(values) for values in times.values()) >= 0
    calls.clear()
    take_turns(work, 1, calls=2, warm_up=0, untimed=3)
    assert sorted("".join(calls)) == list("aaaaabbbbbccccc")
    number, seconds = calls_for(work, 1e-3)
    assert number >= 1
    assert seconds > 0


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([1.0, 20.0, 3.0], [0.5, 10.0, 1.5]) == Quartiles(2, 2, 2)
    assert quartiles([4.0]) == Quartiles(4, 4, 4)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == Quartiles(1.5, 3, 4.5)


def test_one_thread_and_back_again() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def found(width: int, rate: float, gain: float, chosen: str = "batchwise") -> DropoutTimes:
    def spread(value: float) -> Quartiles:
        return Quartiles(0.99 * value, value, 1.01 * value)

    seconds = {"independent": spread(1.0), "mask": spread(1.1), "batchwise": spread(1 / gain)}
    return DropoutTimes(width, rate, seconds, {"mask": spread(1 / 1.1), "batchwise": spread(gain)}, chosen)


def test_break_even_lies_where_the_ratio_crosses_one() -> None:
    assert break_even([found(64, 0.5, 2.0), found(64, 0.1, 0.5)]) == pytest.approx(0.3)
    assert break_even([found(64, 0.1, 1.2), found(64, 0.5, 2.0)]) == 0
    assert break_even([found(64, 0.1, 0.5), found(64, 0.5, 0.9)]) == math.inf
    # A first rate that is lucky does not count: from there on is what was asked.
    assert break_even([found(64, 0.1, 1.1), found(64, 0.3, 0.5), found(64, 0.5, 2.0)]) == pytest.approx(0.4)
    times = [found(64, 0.1, 0.5), found(64, 0.5, 0.9), found(128, 0.1, 0.5), found(128, 0.5, 2.0), found(256, 0.1, 3.0)]
    assert break_evens(times) == {64: "never up to p 0.5", 128: "p 0.30", 256: "p 0.1 or less"}


def test_the_reading_says_what_the_table_says() -> None:
    assert "not faster than nn.Dropout at any" in reading([found(64, 0.5, 0.9)])
    text = reading([found(64, 0.5, 0.9, "mask"), found(128, 0.5, 3.0)])
    assert "at width 128 from" in text
    assert "at most 3 times (width 128, p = 0.5)" in text
    assert "slower than nn.Dropout in 1 of 2 cells" in text
    assert "at every one of these widths" in reading([found(128, 0.5, 3.0)])
    assert found(64, 0.5, 0.9).fastest == "independent"


def test_measuring_a_width_tells_its_progress() -> None:
    shares: list[float] = []
    times = measure(16, [0.25, 0.5], 8, seconds=0.0, on_progress=shares.append)
    assert [(t.width, t.rate) for t in times] == [(16, 0.25), (16, 0.5)]
    assert sum(shares) == pytest.approx(2)
    assert all(t.chosen in ("mask", "batchwise") and min(s.low for s in t.seconds.values()) > 0 for t in times)
