"""Training-mode batch norm with its ReLU on a GPU: torch's layers, torch.compile's kernels, and this library's.

Memory traffic is the limit: forward has to read one tensor of the input's size and write one, backward to read two and
write one. "share" is how much of the bandwidth of a large copy, measured first, a step with no more traffic than that
would have used in the time that was taken. All candidates take turns; times are the device's (CUDA events), of several
calls in a row, so that a call that takes the host longer than the device counts in full. With `--graphs` each step is
captured once and replayed: what the device takes, without the host.

    python -m benchmarks.batch_norm_gpu [--quick] [--graphs] [--what train|residual|evaluation] [--batches 32 256]
"""

import argparse
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from batchlab import nn
from batchlab.kernels import batch_norm as kernel
from batchlab.lab.records import describe_environment
from batchlab.lab.timing import quartiles, ratio
from benchmarks.batch_norm import BN_INCEPTION, RESNET_50
from benchmarks.harness import append

TENSORS = {"train": 5, "residual": 7, "evaluation": 2}
"""How many tensors of the input's size have to be read or written: with a residual, it and its gradient too."""

Call = Callable[[], object]


def cases(quick: bool, batches: list[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype, torch.memory_format]]:
    """Name -> shape, dtype and memory format."""
    found = {}
    for batch in batches:
        for channels, side in dict.fromkeys([*RESNET_50, *([] if quick else BN_INCEPTION)]):
            for dtype in (torch.float32, torch.bfloat16):
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    last = " channels-last" if memory_format == torch.channels_last else ""
                    name = f"{batch}x{channels}x{side}x{side} {str(dtype).removeprefix('torch.')}{last}"
                    found[name] = ((batch, channels, side, side), dtype, memory_format)
    return found


def candidates(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, what: str
) -> dict[str, Call]:
    """Every candidate's step as one call; parameters are in float32, as under autocast."""
    x, gradient, residual, buffer = (
        torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format) for _ in range(4)
    )
    theirs = torch.nn.BatchNorm2d(shape[1]).cuda()
    ours = nn.BatchNorm2d(shape[1], activation="relu", backend="fused").cuda()
    added = what == "residual"

    def plain(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return F.relu(theirs(x) + residual) if added else F.relu(theirs(x))

    def fused(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = ours(x, residual=residual if added else None)
        return y

    torch.compiler.reset()
    layers: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], torch.nn.Module]] = {
        "torch": (plain, theirs),
        "compiled": (torch.compile(plain, dynamic=False), theirs),
        "batchlab": (fused, ours),
    }
    if what == "evaluation":
        theirs.eval()
        ours.eval()
        steps = {name: torch.no_grad()(lambda call=call: call(x, residual)) for name, (call, _) in layers.items()}
    else:
        x.requires_grad_()
        residual.requires_grad_(added)

        def step(call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], layer: torch.nn.Module) -> None:
            leaves = [x, *([residual] if added else []), *layer.parameters()]
            torch.autograd.grad(call(x, residual), leaves, gradient)

        steps = {name: lambda call=call, layer=layer: step(call, layer) for name, (call, layer) in layers.items()}
    return {**steps, "copy": lambda: buffer.copy_(x.detach())}


def captured(call: Call) -> Call:
    """The same, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def take_turns_on_gpu(steps: Mapping[str, Call], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds of one call of each candidate by the device's clock, an entry a round."""
    for call in steps.values():
        for _ in range(3):  # compiles, tunes, fills the allocator
            call()
    torch.cuda.synchronize()
    events = []
    for _ in range(rounds):
        for name, call in steps.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            events.append((name, begin, end))
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, begin, end in events:
        times[name].append(begin.elapsed_time(end) / 1e3 / calls)
    return times


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source, target = torch.empty(2, 2**28, device="cuda").unbind()
    taken = take_turns_on_gpu({"copy": lambda: target.copy_(source)}, rounds=15, calls=5)["copy"]
    return 2 * source.numel() * source.element_size() / median(taken)


def describe_gpu() -> dict[str, Any]:
    """Machine and versions."""
    properties = torch.cuda.get_device_properties(0)
    return describe_environment() | {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
    }


def main() -> None:
    """Measure, print the table, and append a line for each shape to benchmarks/results/batch_norm_gpu.jsonl."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="without BN-Inception's shapes")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs: the device's time alone")
    parser.add_argument("--what", choices=tuple(TENSORS), default="train")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False): nothing is measured.")
        return
    if not kernel.available_on_cuda():
        raise SystemExit(
            "There is a GPU, but no kernels for it: they need Triton (pip install triton) and a C++ compiler."
        )
    torch.manual_seed(0)
    bandwidth, environment = copy_bandwidth(), describe_gpu()
    how = "CUDA graphs" if options.graphs else "eager calls"
    table = Table(
        title=f"BN + ReLU, {options.what}, {how}, {environment['gpu']}, a copy has {bandwidth / 1e9:,.0f} GB/s"
    )
    columns = (
        "shape",
        "MB",
        "torch µs",
        "compiled µs",
        "batchlab µs",
        "times torch",
        "times compiled",
        "copies",
        "share",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "shape" else "right")
    faster: dict[str, list[float]] = {"torch": [], "compiled": []}
    for name, (shape, dtype, memory_format) in cases(options.quick, options.batches).items():
        size = dtype.itemsize * math.prod(shape)
        steps = candidates(shape, dtype, memory_format, options.what)
        if options.graphs:
            steps = {key: captured(call) for key, call in steps.items()}
        calls, rounds = max(3, min(50, int(2e9 / size))), 15
        times = take_turns_on_gpu(steps, rounds, calls)
        mine = times["batchlab"]
        spread = {key: quartiles(values) for key, values in times.items()}
        gains = {key: ratio(times[key], mine) for key in faster}
        share = TENSORS[options.what] * size / spread["batchlab"].median / bandwidth
        for key, gain in gains.items():
            faster[key].append(gain.median)
        table.add_row(
            name,
            f"{size / 1e6:.1f}",
            *(f"{1e6 * spread[key].median:,.1f}" for key in ("torch", "compiled", "batchlab")),
            *(f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})" for gain in gains.values()),
            f"{ratio(mine, times['copy']).median:.1f}",
            f"{100 * share:.0f} %",
        )
        append(
            "batch_norm_gpu",
            {
                "benchmark": "batch_norm_gpu",
                "what": options.what,
                "graphs": options.graphs,
                "case": name,
                "rounds": rounds,
                "calls": calls,
                "environment": environment,
                "copy_bandwidth": round(bandwidth),
                "microseconds": {
                    key: [round(1e6 * value, 2) for value in (q.median, q.low, q.high)] for key, q in spread.items()
                },
                "faster": {key: [round(v, 3) for v in (g.median, g.low, g.high)] for key, g in gains.items()},
                "share": round(share, 4),
            },
        )
    console = Console()
    console.print(table)
    for key, values in faster.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        console.print(
            f"than {key}: geometric mean {mean:.2f} times faster, worst {min(values):.2f}, {len(values)} cases"
        )


if __name__ == "__main__":
    main()
