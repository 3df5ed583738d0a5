"""Largest output error against float64 where the mean is a thousand times the standard deviation (not a timing)."""

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from batchlab.functional import batch_norm

SHAPES = {
    "(60, 100)": ((60, 100), torch.contiguous_format),
    "(32, 16, 28, 28)": ((32, 16, 28, 28), torch.contiguous_format),
    "(32, 16, 28, 28), channels-last": ((32, 16, 28, 28), torch.channels_last),
}


def errors(ratio: float = 1e3, seeds: int = 5) -> dict[str, tuple[float, float]]:
    """Shape -> largest error over seeds of torch's operation and of this library's."""
    found = {}
    for name, (shape, memory_format) in SHAPES.items():
        worst = [0.0, 0.0]
        for seed in range(seeds):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + ratio
            x = x.contiguous(memory_format=memory_format)
            exact = F.batch_norm(x.double(), None, None, training=True)
            for index, function in enumerate((F.batch_norm, batch_norm)):
                error = (function(x, None, None, training=True).double() - exact).abs().max()
                worst[index] = max(worst[index], float(error))
        found[name] = (worst[0], worst[1])
    return found


def main() -> None:
    """Print the table of the README."""
    table = Table(title="largest output error, float32, mean/std 1e3, 5 seeds")
    for column in ("input", "torch", "batchlab"):
        table.add_column(column)
    for name, (theirs, ours) in errors().items():
        table.add_row(name, f"{theirs:.1e}", f"{ours:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
