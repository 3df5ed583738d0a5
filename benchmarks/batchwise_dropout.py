"""Batchwise dropout on submatrices: whole training steps, against nn.Dropout and against the limit.

The limit is the small dense network of the kept units. For 784-2000-2000-10 with batch 100, input 0.2, hidden 0.5:

    operations       2 · batch · inputs · outputs for a product, three products a layer, two for the first layer:
                     3.04e9 dense; 0.86e9 for 627-1000-1000-10, which is 28 %.
    bytes            in passes over the 2000x2000 matrix (16 MB; in and out of memory, not of the cache), dense: the
                     product forward reads it once, the one backward once, the gradient is written; torch's SGD reads
                     gradient, momentum and weight, writes and reads the momentum again, writes both: 3 + 8 = 11
                     passes (3 + 5 if fused). The small network: the same of a quarter of the matrix, 2.75.
    on submatrices   gather reads half of the matrix (kept rows; a cache line holds sixteen columns, so none is
                     spared) and writes a quarter; the products read that quarter twice; the update reads and writes
                     the kept rows of weight and momentum, four halves; the gradient itself stays in the cache: 3.25.

So in operations there is nothing to lose against the small network, in bytes a fifth. Convolutions have few weights
and much arithmetic: the limit there is the arithmetic.

    python -m benchmarks.batchwise_dropout            the table, and memory
    python -m benchmarks.batchwise_dropout --sweep    mode="auto" against nn.Dropout, widths 32 to 8192, p 0.05 to 0.9
                                                      (some minutes)
"""

import argparse
import multiprocessing
from itertools import product
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from batchlab.lab.dropout_timing import (
    CONVOLUTIONAL,
    Network,
    TrainingStep,
    held_bytes,
    mlp,
    parameter_bytes,
    random_batches,
)
from batchlab.lab.memory import peak_growth
from batchlab.lab.records import describe_environment
from batchlab.lab.timing import calls_for, ratio, take_turns
from benchmarks.harness import Timing, append, interleave, report

NAME = "batchwise_dropout"

# Network, batch size; at least so many times as fast as nn.Dropout, at most so many times the small network's time.
GOALS: tuple[tuple[Network, int, float, float], ...] = (
    (mlp((800, 800)), 100, 3.4, 1.25),
    (mlp((2000, 2000)), 100, 3.2, 1.20),
    (mlp((4096, 4096, 4096)), 128, 3.6, 1.20),
    (mlp((2000, 2000)), 512, 3.3, 1.20),
    (CONVOLUTIONAL, 100, 2.5, 1.25),
)
# Seconds of a turn. Training takes step after step; the first one of a turn finds the other networks' weights in the
# cache, and costs the small networks an eighth more.
TURN = 0.1
SWEEP_TURN = 0.03
FUSED = ("independent", "small")
MEMORY_KINDS = ("independent", "none", "small", "batchwise")

WIDTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
RATES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
INPUT_RATES = (0.2, 0.0)


def case(network: Network, batch_size: int) -> str:
    return f"{network.name}, batch {batch_size}"


def speed(network: Network, batch_size: int, seconds: float) -> dict[str, Timing]:
    """Time the candidates for about so many seconds, batchwise dropout first; print and append."""
    images, labels = random_batches(network, 2 * batch_size)

    def step(kind: str, fused: bool = False) -> TrainingStep:
        return TrainingStep(network, kind, images, labels, batch_size, fused=fused)

    candidates = {kind: step(kind) for kind in ("batchwise", "independent", "none", "small")}
    candidates |= {f"{kind}, fused SGD": step(kind, fused=True) for kind in FUSED}
    calls, one_round = calls_for(candidates, TURN)
    rounds = min(101, max(11, round(seconds / one_round)))
    timings = interleave(candidates, rounds, case(network, batch_size), calls, warm_up=0)
    report(NAME, case(network, batch_size), timings, rounds)
    return timings


def _judged(value: float, goal: float, holds: bool) -> str:
    return f"[{'green' if holds else 'red'}]{value:.2f}[/]\n({'≥' if goal >= 2 else '≤'} {goal:g})"


def speeds(seconds: float, console: Console) -> None:
    """Print the table of goals."""
    measured = [speed(network, batch_size, seconds) for network, batch_size, _, _ in GOALS]
    table = Table(
        title="batchwise dropout: a whole training step, one thread, medians",
        caption="a: times as fast as nn.Dropout; b: as no dropout; c: times the time of the small dense network. "
        "Goals in brackets. Fused: against torch's fused SGD.",
    )
    for name in ("network\nbatch", "ms", "a", "a\nfused", "b", "c", "c\nfused"):
        table.add_column(name, justify="left" if name.startswith("network") else "right")
    for (network, batch_size, least, most), timings in zip(GOALS, measured, strict=True):
        gain = {name: timing.ratio for name, timing in timings.items()}
        table.add_row(
            f"{network.name}\n{batch_size}",
            f"{1e3 * timings['batchwise'].seconds:.3g}",
            _judged(gain["independent"], least, gain["independent"] >= least),
            f"{gain['independent, fused SGD']:.2f}",
            f"{gain['none']:.2f}",
            _judged(1 / gain["small"], most, 1 / gain["small"] <= most),
            f"{1 / gain['small, fused SGD']:.2f}",
        )
    console.print(table)


def peak_of_training(network: Network, kind: str, batch_size: int) -> int | None:
    """In a fresh process: by how much three training steps let the process grow, beyond weights and images."""
    torch.set_num_threads(1)
    # What is allocated once in a process, by BLAS and by our kernels' loading, belongs to nobody.
    tiny = mlp((64,)) if not network.kernels else Network((3, 8, 10), (0.0, 0.5), (3,), 8)
    warm_up = TrainingStep(tiny, kind, *random_batches(tiny, 10), 10)
    warm_up()
    step = TrainingStep(network, kind, *random_batches(network, batch_size), batch_size)

    def train() -> None:
        for _ in range(3):
            step()

    return peak_growth(train)


def memory(console: Console) -> None:
    """Print and append what each kind of network holds."""
    table = Table(title="memory, MB (10⁶ bytes)")
    for name in ("network, batch", "", "activations", "copies of weights", "peak", "weights alone"):
        table.add_column(name, justify="right" if name and not name.startswith("network") else "left")
    spawn = multiprocessing.get_context("spawn")
    for network, batch_size, _, _ in GOALS:
        line: dict[str, object] = {}
        for kind in MEMORY_KINDS:
            held = held_bytes(TrainingStep(network, kind, *random_batches(network, batch_size), batch_size))
            with spawn.Pool(1) as pool:
                peak = pool.apply(peak_of_training, (network, kind, batch_size))
            line[kind] = {"activations": held.activations, "weight_copies": held.weights, "peak": peak}
            weights = parameter_bytes(network.small() if kind == "small" else network)
            table.add_row(
                case(network, batch_size) if kind == MEMORY_KINDS[0] else "",
                kind,
                *(f"{value / 1e6:.2f}" for value in (held.activations, held.weights)),
                "–" if peak is None else f"{peak / 1e6:.0f}",
                f"{weights / 1e6:.1f}",
            )
        table.add_section()
        facts = {"bytes": line, "environment": describe_environment()}
        append(NAME, {"benchmark": NAME, "case": f"memory of {case(network, batch_size)}", **facts})
    console.print(table)
    console.print(
        "Activations: tensors with an entry for each sample that wait for the backward pass (layers' inputs and "
        "outputs, masks; not the batch itself). Copies of weights: what waits beside them, for batchwise dropout the "
        "kept blocks and indices. Peak: the most by which three training steps let a fresh process's resident memory "
        "grow beyond weights and images, as the operating system counts it, whoever allocated it: gradients, the "
        "momentum (as large as the weights, for every kind), all of the above, and buffers.",
        highlight=False,
    )


def sweep(console: Console, batch_size: int = 100) -> None:
    """Print and append, for each width and p, the time of mode="auto" as a multiple of nn.Dropout's.

    With dropout of the inputs too, and without: where nn.Dropout draws a number for each of 784 inputs, it is slow in
    itself, so the networks without are the harder ones to be faster than.
    """
    table = Table(title=f'mode="auto" over nn.Dropout: 784-n-n-10, hidden dropout p, batch {batch_size}')
    for name in ("n", "inputs", *(f"p {rate:g}" for rate in RATES)):
        table.add_column(name, justify="right")
    for width, input_rate in product(WIDTHS, INPUT_RATES):
        cells = []
        line: dict[str, dict[str, object]] = {"ratio": {}, "milliseconds": {}}
        network = mlp((width, width), input_rate=input_rate)
        images, labels = random_batches(network, batch_size)
        steps = {kind: TrainingStep(network, kind, images, labels, batch_size) for kind in ("independent", "auto")}
        for rate in RATES:
            for step in steps.values():
                step.set_rates(rate)
            calls, seconds = calls_for(steps, SWEEP_TURN)
            times = take_turns(steps, min(31, max(5, round(1.5 / seconds))), calls=calls, warm_up=0)
            found = ratio(times["auto"], times["independent"])
            cells.append(f"[{'red' if found.low > 1 else 'green'}]{found.median:.2f}[/]")
            line["ratio"][f"{rate:g}"] = [round(value, 4) for value in (found.median, found.low, found.high)]
            line["milliseconds"][f"{rate:g}"] = {kind: round(1e3 * median(v), 4) for kind, v in times.items()}
        table.add_row(str(width), f"p {input_rate:g}", *cells, end_section=input_rate == INPUT_RATES[-1])
        console.print(f"{width}, inputs p {input_rate:g}: {', '.join(cells)}", highlight=False)
        case_name = f"auto over independent, {network.name}, input dropout {input_rate:g}, batch {batch_size}"
        append(NAME, {"benchmark": NAME, "case": case_name, **line, "environment": describe_environment()})
    console.print(table)
    console.print("Medians; red where even the first quartile of the ratios is above 1.", highlight=False)


def main(seconds: float = 20.0) -> None:
    """The table of goals and the memory of each kind."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    speeds(seconds, console)
    memory(console)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sweep", action="store_true", help='mode="auto" against nn.Dropout over widths and rates')
    parser.add_argument("--seconds", type=float, default=20.0, help="for each network of the table (default: 20)")
    given = parser.parse_args()
    if given.sweep:
        torch.set_num_threads(1)
        sweep(Console())
    else:
        main(given.seconds)
