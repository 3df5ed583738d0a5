"""Training-mode batch norm, forward and backward: torch's layer against this library's backends.

Memory traffic is the limit for large inputs. Counting passes over the tensor (read or write), float32: torch's
operation reads x twice and writes y; backward reads x and the gradient twice and writes one: 8 passes. The shift that
keeps the digits adds a read for the mean, and a read and a write for the shifted copy: 11, or 1.4 times as many.
"""

import torch

from batchlab import nn
from benchmarks.harness import interleave, report

SHAPES = {
    "60x100": ((60, 100), torch.contiguous_format, 100),
    "128x2048": ((128, 2048), torch.contiguous_format, 10),
    "32x64x56x56": ((32, 64, 56, 56), torch.contiguous_format, 1),
    "32x64x56x56 channels-last": ((32, 64, 56, 56), torch.channels_last, 1),
}


def main(rounds: int = 30) -> None:
    """Compare on shapes from the smallest network to an image network's layer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for case, (shape, memory_format, repeats) in SHAPES.items():
        x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
        gradient = torch.randn(shape).contiguous(memory_format=memory_format)
        kind = "BatchNorm1d" if len(shape) == 2 else "BatchNorm2d"
        layers = {
            "torch": getattr(torch.nn, kind)(shape[1]),
            "auto": getattr(nn, kind)(shape[1]),
            "reference": getattr(nn, kind)(shape[1], backend="reference"),
        }

        def step(layer, x=x, gradient=gradient, repeats=repeats) -> None:  # type: ignore[no-untyped-def]
            for _ in range(repeats):
                layer(x).backward(gradient)
                x.grad = None

        candidates = {name: (lambda layer=layer, step=step: step(layer)) for name, layer in layers.items()}
        report("batch_norm", case, interleave(candidates, rounds, case), rounds, repeats)


if __name__ == "__main__":
    main()
