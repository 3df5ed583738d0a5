"""Chains for the tests of `SubmatrixSequential`, and the comparison of one with the other."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchlab.nn as ours
from batchlab.functional import SubmatrixGradient
from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from batchlab.optim import SubmatrixSGD

MODES = ("submatrix", "mask")


def run(net: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, list[Tensor | None]]:
    """Output and all gradients, the input's first, of a loss that weighs each output differently."""
    net.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = net(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    (y * weights).sum().backward()
    return y.detach(), [x.grad, *(p.grad for p in net.parameters())]


def dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.to_dense() if isinstance(gradient, SubmatrixGradient) else gradient


def near(a: Tensor, b: Tensor, tolerance: float, what: str = "") -> None:
    assert a.shape == b.shape, what
    assert a.dtype == b.dtype, what
    if a.numel():
        error = (a - b).abs().max().item()
        assert error <= tolerance * max(1.0, b.abs().max().item()), f"{what} differs by {error}"


def patterns(net: nn.Module) -> list[list[int] | None]:
    found = [m.kept for m in net.modules() if isinstance(m, BatchwiseDropout)]
    return [None if kept is None else kept.tolist() for kept in found]


def compare(modules: list[nn.Module], x: Tensor, tolerance: float = 1e-12, seeds: int = 2) -> None:
    """Both modes against `nn.Sequential`, where the same seed draws the same patterns."""
    plain = nn.Sequential(*copy.deepcopy(modules))
    nets = {mode: SubmatrixSequential(*copy.deepcopy(modules), mode=mode) for mode in MODES}
    for seed in range(seeds):
        expected, gradients = run(plain, x, seed)
        for mode, net in nets.items():
            y, found = run(net, x, seed)
            near(y, expected, tolerance, f"{mode}: output")
            names = ["input", *(name for name, _ in net.named_parameters())]
            likes = [x, *net.parameters()]
            for name, a, b, like in zip(names, found, gradients, likes, strict=True):
                near(dense(a, like), dense(b, like), tolerance, f"{mode}: gradient of {name}")
            assert patterns(net) == patterns(plain)
        for (name, a), (_, b) in zip(nets["submatrix"].named_buffers(), nets["mask"].named_buffers(), strict=True):
            near(a, b, tolerance, name)


def compare_training(modules: list[nn.Module], x: Tensor, tolerance: float = 1e-12) -> None:
    """The optimizer changes the same entries in both modes: each gradient says the same about who took part."""
    nets = {mode: SubmatrixSequential(*copy.deepcopy(modules), mode=mode) for mode in MODES}
    for net in nets.values():
        if not list(net.parameters()):
            return
        optimizer = SubmatrixSGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1, nesterov=True)
        for seed in range(3):
            run(net, x, seed)
            optimizer.step()
    for (name, a), (_, b) in zip(
        nets["submatrix"].state_dict().items(), nets["mask"].state_dict().items(), strict=True
    ):
        near(a, b, tolerance, name)


def mlp(p: float = 0.5, exact: bool = True) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        BatchwiseDropout(0.2, exact=exact),
        nn.Linear(12, 40),
        nn.ReLU(),
        BatchwiseDropout(p, exact=exact),
        nn.Linear(40, 33),
        nn.ReLU(),
        BatchwiseDropout(p, exact=exact),
        nn.Linear(33, 5),
    ]


def convnet(batch_norm: Any = nn.BatchNorm2d) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Conv2d(3, 8, 3, padding=1),
        batch_norm(8),
        nn.PReLU(8),
        BatchwiseDropout(0.5),
        nn.Conv2d(8, 12, 3),
        batch_norm(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        BatchwiseDropout(0.5),
        nn.Flatten(),
        nn.Linear(12 * 9, 20),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        BatchwiseDropout(0.5),
        nn.Linear(20, 4),
    ]


CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "mlp": (mlp, (12,)),
    "mlp-bernoulli": (lambda: mlp(exact=False), (12,)),
    "convnet": (convnet, (3, 8, 8)),
    "convnet-our-batch-norm": (lambda: convnet(ours.BatchNorm2d), (3, 8, 8)),
}


def inputs(shape: tuple[int, ...], batch: int = 5) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(nothing)
    return module


def nothing(module: nn.Module, args: Any, result: Tensor) -> None:
    pass
