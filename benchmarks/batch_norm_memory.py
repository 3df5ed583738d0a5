"""Peak memory of a training step of batch norm and ReLU, beyond its input and the gradient behind it.

Each candidate has a process of its own: the largest resident set that the system saw, less what was resident before the
first step. Memory that waits for the next result counts as used.

    python -m benchmarks.batch_norm_memory
"""

import argparse
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from batchlab import nn
from batchlab.lab.records import describe_environment
from benchmarks.harness import append

SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 256, 14, 14))
STEPS = 5


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(kind: str, shape: tuple[int, ...]) -> int:
    """Run some steps; bytes that the largest resident set had more than what was there before them."""
    torch.set_num_threads(1)
    layer = torch.nn.BatchNorm2d(shape[1]) if kind == "torch" else nn.BatchNorm2d(shape[1], activation="relu")
    small = torch.randn(2, shape[1], 2, 2, requires_grad=True)
    F.relu(layer(small)).backward(torch.ones_like(small))  # what is loaded at the first use is not the step's
    x, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
    before = resident()
    for _ in range(STEPS):
        y = layer(x) if kind == "batchlab" else F.relu(layer(x))
        y.backward(gradient)
        x.grad = None
        del y
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def main() -> None:
    """Measure, print a table, and append a line for each shape to benchmarks/results/batch_norm_memory.jsonl."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs=2, metavar=("KIND", "SHAPE"), help="measure one in this process; print bytes")
    options = parser.parse_args()
    if options.only:
        print(measure(options.only[0], tuple(map(int, options.only[1].split("x")))))
        return
    table = Table(title="Peak memory of a step of BN + ReLU, in tensors of the input's size")
    for column in ("shape", "MB", "torch", "batchlab", "share"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for shape in SHAPES:
        name, size = "x".join(map(str, shape)), 4 * math.prod(shape)
        found = {}
        for kind in ("torch", "batchlab"):
            command = [sys.executable, "-m", "benchmarks.batch_norm_memory", "--only", kind, name]
            found[kind] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        share = found["batchlab"] / found["torch"]
        of_input = {kind: found[kind] / size for kind in found}
        table.add_row(
            name, f"{size / 1e6:.1f}", f"{of_input['torch']:.2f}", f"{of_input['batchlab']:.2f}", f"{share:.2f}"
        )
        append(
            "batch_norm_memory",
            {
                "benchmark": "batch_norm_memory",
                "case": name,
                "environment": describe_environment(),
                "bytes": found,
                "share": round(share, 3),
            },
        )
    Console().print(table)


if __name__ == "__main__":
    main()
