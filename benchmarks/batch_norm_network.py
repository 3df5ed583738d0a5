"""A training step of whole networks: torch's layers, this library's by plain operations, and by the kernel.

A residual network of BN-heavy blocks and the perceptron of Ioffe & Szegedy 2015, section 4.1: forward, backward and
SGD. "without" has no batch norm: the step cannot be faster than that. First all take the same 100 steps from the same
weights on the same data; how far apart the losses with plain operations and with the kernel get is printed and kept,
and how far those with plain operations and with torch's layers do.

    python -m benchmarks.batch_norm_network [--threads 1]
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab import nn
from batchlab.lab.records import describe_environment
from benchmarks.harness import append, interleave, print_timings

STEPS = 100
Normalization = Callable[[int], torch.nn.Module]


class Block(torch.nn.Module):
    """Two convolutions, each with a batch norm, around a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, width: int, normalize: Normalization | None, *, fused: bool) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(width, width, 3, padding=1, bias=normalize is None)
        self.second = torch.nn.Conv2d(width, width, 3, padding=1, bias=normalize is None)
        self.norms = torch.nn.ModuleList([] if normalize is None else [normalize(width), normalize(width)])
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, add, activate: in one call each where the layer can."""
        if not self.norms:
            return F.relu(self.second(F.relu(self.first(x))) + x)
        if self.fused:
            y: Tensor = self.norms[1](self.second(self.norms[0](self.first(x))), residual=x)
            return y
        return F.relu(self.norms[1](self.second(F.relu(self.norms[0](self.first(x))))) + x)


def residual_network(kind: str) -> torch.nn.Module:
    """8 blocks at 32 x 32, 16 x 16 and 8 x 8 positions."""
    normalizations: dict[str, Normalization | None] = {
        "without": None,
        "torch": torch.nn.BatchNorm2d,
        "reference": lambda width: nn.BatchNorm2d(width, activation="relu", backend="reference"),
        "auto": lambda width: nn.BatchNorm2d(width, activation="relu"),
    }
    normalize = normalizations[kind]
    fused = kind in ("reference", "auto")
    layers: list[torch.nn.Module] = [torch.nn.Conv2d(3, 32, 3, padding=1)]
    for before, width, blocks in ((32, 32, 3), (32, 64, 3), (64, 128, 2)):
        if width != before:
            layers.append(torch.nn.Conv2d(before, width, 2, stride=2))
        layers += [Block(width, normalize, fused=fused) for _ in range(blocks)]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(128, 10))


def perceptron(kind: str) -> torch.nn.Module:
    """784, three times 100 sigmoid units, 10."""
    layers: list[torch.nn.Module] = [torch.nn.Flatten()]
    width = 784
    for _ in range(3):
        layers.append(torch.nn.Linear(width, 100, bias=kind == "without"))
        width = 100
        if kind in ("without", "torch"):
            layers += [] if kind == "without" else [torch.nn.BatchNorm1d(100)]
            layers.append(torch.nn.Sigmoid())
        else:
            layers.append(nn.BatchNorm1d(100, activation="sigmoid", backend=kind))
    return torch.nn.Sequential(*layers, torch.nn.Linear(100, 10))


def stepper(network: torch.nn.Module, x: Tensor, target: Tensor) -> Callable[[], float]:
    """One training step on the same batch; returns the loss."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    """Compare the curves, time the steps, print both, append them to benchmarks/results/batch_norm_network.jsonl."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Steps in a turn: one training takes many in a row, and finds the processor's caches as its last step left them.
    cases = {
        "residual network, batch 32": (residual_network, (32, 3, 32, 32), torch.channels_last, 15, 1),
        "residual network, batch 32, contiguous": (residual_network, (32, 3, 32, 32), torch.contiguous_format, 15, 1),
        "perceptron, batch 60": (perceptron, (60, 1, 28, 28), torch.contiguous_format, 60, 25),
    }
    for title, (build, shape, memory_format, rounds, calls) in cases.items():
        torch.manual_seed(0)
        x, target = torch.randn(shape).contiguous(memory_format=memory_format), torch.randint(10, shape[:1])
        steps = {}
        for kind in ("torch", "reference", "auto", "without"):
            torch.manual_seed(1)
            steps[kind] = stepper(build(kind).to(memory_format=memory_format), x, target)
        curves = {kind: [steps[kind]() for _ in range(STEPS)] for kind in ("reference", "auto", "torch")}
        apart = {
            kind: max(abs(a - b) for a, b in zip(curves["reference"], curves[kind], strict=True))
            for kind in ("auto", "torch")
        }
        timings = interleave(steps, rounds, title, calls=calls)
        print_timings(title, timings)
        print(
            f"losses over {STEPS} steps: with auto at most {apart['auto']:.1e} from those with reference, with torch "
            f"{apart['torch']:.1e}; {curves['reference'][0]:.4f} at the start, {curves['reference'][-1]:.4f} at the end"
        )
        append(
            "batch_norm_network",
            {
                "benchmark": "batch_norm_network",
                "case": title,
                "rounds": rounds,
                "steps_in_a_turn": calls,
                "threads": options.threads,
                "environment": describe_environment() | {"threads": options.threads},
                "microseconds": {name: round(1e6 * timing.seconds, 1) for name, timing in timings.items()},
                "ratio": {name: [round(t.ratio, 4), round(t.low, 4), round(t.high, 4)] for name, t in timings.items()},
                "losses_apart": apart,
                "losses": {kind: [curve[0], curve[-1]] for kind, curve in curves.items()},
            },
        )


if __name__ == "__main__":
    main()
