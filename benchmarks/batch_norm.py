"""Training-mode batch norm with its activation: torch's layers one after the other against one layer of this library.

Memory traffic is the limit. Counting in tensors of the input's size: forward has to read one and write one, backward
to read two and write one: 2.5 copies, if what is read twice is in the cache the second time. The table says how many
copies into an existing buffer, measured in the same rounds, each took. torch's ReLU alone reads and writes as much,
and is one operation for autograd: what a batch norm with its ReLU costs is to be compared with that, too.

Candidates take turns, in an order drawn anew each round. A turn begins with calls that are not timed, until the caches
are as this candidate leaves them itself: a program has torch's layers or these, not both. With `--behind-others` it
begins with the timed ones, which find what another candidate has left: its own memory is not in the caches then, as
that of a layer in a large network is not.

    python -m benchmarks.batch_norm [--threads 1] [--quick] [--what train|residual|evaluation] [--behind-others]
                                    [--compiled]
"""

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from batchlab import nn
from batchlab.lab.records import describe_environment
from benchmarks.harness import append, interleave

# Distinct inputs of batch norms: (channels, side). Ioffe & Szegedy 2015, Figure 5; He et al. 2016, ResNet-50.
BN_INCEPTION = [
    (64, 112),
    *((c, 56) for c in (64, 192)),
    *((c, 28) for c in (32, 64, 96, 128)),
    *((c, 14) for c in (64, 96, 128, 160, 192, 224)),
    *((c, 7) for c in (128, 160, 192, 224, 256, 320, 352)),
]
RESNET_50 = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28)]
RESNET_50 += [(256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)]
# Copies that each number read once and written once costs: what no kernel can do much better.
LIMIT = {"train": 2.5, "residual": 4.0, "evaluation": 1.0}
COMPILED = [(60, 100), (1024, 1024), (32, 64, 56, 56), (32, 256, 14, 14), (32, 2048, 7, 7)]
OTHERS = [(60, 100), (100, 800), (128, 4096), (1024, 1024), (32, 256, 400), (4, 64, 16, 32, 32)]


def cases(quick: bool) -> dict[str, tuple[tuple[int, ...], torch.memory_format]]:
    """Name -> shape and memory format."""
    plain, last = torch.contiguous_format, torch.channels_last
    found = {"x".join(map(str, shape)): (shape, plain) for shape in OTHERS}
    images = list(dict.fromkeys([*RESNET_50, *([] if quick else BN_INCEPTION)]))
    for channels, side in images:
        shape = (32, channels, side, side)
        name = "x".join(map(str, shape))
        found |= {name: (shape, plain), f"{name} channels-last": (shape, last)}
    return found


def candidates(
    shape: tuple[int, ...], memory_format: torch.memory_format, what: str, compiled: bool
) -> dict[str, Callable[[], object]]:
    """Each as one call: torch, this library, a copy, torch's ReLU alone; if asked for, torch's two layers compiled."""
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    gradient, residual, buffer = (torch.empty_like(x).copy_(torch.randn(shape)) for _ in range(3))
    kind = f"BatchNorm{max(1, len(shape) - 2)}d"
    theirs = getattr(torch.nn, kind)(shape[1])
    ours = getattr(nn, kind)(shape[1], activation="relu")

    def step(y: torch.Tensor, leaves: list[torch.Tensor]) -> None:
        torch.autograd.grad(y, leaves, gradient)

    if what == "evaluation":
        theirs.eval()
        ours.eval()
        return {
            "torch": torch.no_grad()(lambda: F.relu(theirs(x))),
            "batchlab": torch.no_grad()(lambda: ours(x)),
            "copy": lambda: buffer.copy_(x),
            "relu": torch.no_grad()(lambda: F.relu(x)),
        }
    x.requires_grad_()
    if what == "residual":
        residual.requires_grad_()
        return {
            "torch": lambda: step(F.relu(theirs(x) + residual), [x, residual, *theirs.parameters()]),
            "batchlab": lambda: step(ours(x, residual=residual), [x, residual, *ours.parameters()]),
            "copy": lambda: buffer.copy_(x.detach()),
        }
    found: dict[str, Callable[[], object]] = {
        "torch": lambda: step(F.relu(theirs(x)), [x, *theirs.parameters()]),
        "batchlab": lambda: step(ours(x), [x, *ours.parameters()]),
        "copy": lambda: buffer.copy_(x.detach()),
        "relu": lambda: step(F.relu(x), [x]),
    }
    if compiled:
        both = torch.compile(torch.nn.Sequential(theirs, torch.nn.ReLU()), fullgraph=True, dynamic=False)
        found["compiled"] = lambda: step(both(x), [x, *theirs.parameters()])
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    """Measure, print the table, and append a line for each shape to benchmarks/results/batch_norm.jsonl."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="without BN-Inception's shapes")
    parser.add_argument("--what", choices=("train", "residual", "evaluation"), default="train")
    parser.add_argument("--behind-others", action="store_true", help="time the first calls of a turn, too")
    parser.add_argument("--compiled", action="store_true", help="a few shapes; torch.compile of torch's layers as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table(title=f"BN + ReLU, {options.what}, float32, {options.threads} thread(s)")
    last = "torch.compile µs" if options.compiled else "copies"
    for column in ("shape", "MB", "torch µs", "batchlab µs", "times faster", "quartiles", "ReLU alone µs", last):
        table.add_column(column, justify="left" if column == "shape" else "right", no_wrap=column == "shape")
    ratios, limits, alone = [], [], []
    for name, (shape, memory_format) in cases(options.quick).items():
        if options.compiled:
            if shape not in COMPILED:
                continue
            torch.compiler.reset()
        size = 4 * math.prod(shape)
        calls = max(1, min(200, int((2e6 if options.behind_others else 1e7) / size)))
        rounds = max(7, min(40, int(3e8 / size / calls)))
        untimed = 0 if options.behind_others else max(1, min(20, int(1e8 / size)))
        timings = interleave(
            candidates(shape, memory_format, options.what, options.compiled),
            rounds,
            name,
            calls=calls,
            untimed=untimed,
        )
        mine, theirs = timings["batchlab"], timings["torch"]
        faster, copies = 1 / mine.ratio, mine.seconds / timings["copy"].seconds
        ratios.append(faster)
        limits.append(theirs.seconds / (LIMIT[options.what] * timings["copy"].seconds))
        relu = timings.get("relu")
        if relu is not None:
            alone.append(1 / relu.ratio)
        table.add_row(
            name,
            f"{size / 1e6:.1f}",
            f"{1e6 * theirs.seconds:,.0f}",
            f"{1e6 * mine.seconds:,.0f}",
            f"{faster:.2f}",
            f"{1 / mine.high:.2f} to {1 / mine.low:.2f}",
            "" if relu is None else f"{1e6 * relu.seconds:,.0f}",
            f"{1e6 * timings['compiled'].seconds:,.0f}" if options.compiled else f"{copies:.1f}",
        )
        append(
            "batch_norm",
            {
                "benchmark": "batch_norm",
                "what": options.what,
                "case": name,
                "rounds": rounds,
                "threads": options.threads,
                "untimed": untimed,
                "environment": describe_environment() | {"threads": options.threads},
                "microseconds": {key: round(1e6 * t.seconds, 2) for key, t in timings.items()},
                "faster": [round(faster, 3), round(1 / mine.high, 3), round(1 / mine.low, 3)],
            },
        )
    console = Console()
    console.width = max(console.width, 120)  # wider than some terminals, which wrap it, but nothing is cut off
    console.print(table)
    console.print(
        f"geometric mean {geometric_mean(ratios):.2f} times faster, worst {min(ratios):.2f}, {len(ratios)} shapes; "
        f"{LIMIT[options.what]:g} copies of each would be {geometric_mean(limits):.2f} times faster"
        + (f", torch's ReLU alone {geometric_mean(alone):.2f} times" if alone else "")
    )


if __name__ == "__main__":
    main()
