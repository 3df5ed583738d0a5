"""Whitening in training, forward and backward, against torch's batch norm on the same input.

For n samples in groups of g channels the products cost 2ng² operations each (covariance and output forward, three more
backward), in float64 for the covariance, and the inverse square root about g³ in float64. Batch norm does 8 passes over
the input and next to no arithmetic, so the ratio grows with g.
"""

import torch

from batchlab import nn
from benchmarks.harness import interleave, report

SHAPE = (32, 64, 28, 28)


def main(rounds: int = 20) -> None:
    """Compare methods and group sizes on an image network's layer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(SHAPE, requires_grad=True)
    gradient = torch.randn(SHAPE)
    layers: dict[str, torch.nn.Module] = {"torch": torch.nn.BatchNorm2d(SHAPE[1])}
    for method in ("zca", "cholesky", "newton"):
        for size in (16, 64):
            layers[f"{method}, groups of {size}"] = nn.Whitening2d(SHAPE[1], method=method, group_size=size)

    def step(layer: torch.nn.Module) -> None:
        layer(x).backward(gradient)
        x.grad = None

    candidates = {name: (lambda layer=layer: step(layer)) for name, layer in layers.items()}
    case = "x".join(map(str, SHAPE))
    report("whitening", case, interleave(candidates, rounds, case), rounds)


if __name__ == "__main__":
    main()
