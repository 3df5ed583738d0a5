"""The Triton kernels for tests: on the GPU if there is one, else in Triton's interpreter on the CPU; and what is right.

Test modules import from here before anything of triton; they are skipped where it is not installed.
"""

import math
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.batch_norm_tables import ACTIVATIONS

DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"


def load() -> ModuleType:
    """Import the kernels, interpreted if there is no GPU, and leave the environment as it was."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
        # What triton's launcher would import at its first call, when the environment is as before.
        import_module("triton.experimental.gluon")
        from batchlab.kernels import batch_norm_triton

    if DEVICE == "cpu" and not batch_norm_triton.INTERPRETED:
        pytest.skip("triton was imported before, without its interpreter", allow_module_level=True)
    return batch_norm_triton


B: Final = load()

DTYPES: Final = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def planes(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.view(shape)


def innermost(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.view(shape).movedim(1, -1).contiguous().movedim(-1, 1)


def strided(*shape: int) -> Callable[[Tensor], Tensor]:
    """Every second number of a tensor twice as wide: neither layout."""
    return lambda values: torch.stack([values.view(shape), values.view(shape)], dim=-1).flatten(-2)[..., ::2]


LAYOUTS: Final[dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]]] = {
    name: (make(*shape), shape)
    for name, make, shape in [
        ("2d", planes, (60, 7)),
        ("3d", planes, (5, 3, 17)),
        ("4d", planes, (4, 5, 6, 7)),
        ("channels-last", innermost, (4, 5, 6, 7)),
        ("channels-last-3d", innermost, (2, 3, 4, 5, 3)),
        ("strided", strided, (4, 3, 5, 6)),
        ("one-pixel", planes, (6, 5, 1, 1)),
        ("one-channel", planes, (4, 1, 5, 5)),
        ("one-sample", planes, (1, 3, 2, 2)),
        ("two-samples", planes, (2, 3)),
        ("single", planes, (1, 1)),
    ]
}


def numbers(name: str, dtype: torch.dtype, mean: float = 1.0, std: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers in one of the `LAYOUTS`; every channel has another mean."""
    arrange, shape = LAYOUTS[name]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std
    offsets = mean * (1 + torch.arange(shape[1], dtype=torch.float64) / shape[1])
    return arrange((values + offsets.view(1, -1, *[1] * (len(shape) - 2))).to(dtype).flatten()).to(DEVICE)


def affine(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights, one negative and one zero among them, and biases."""
    generator = torch.Generator().manual_seed(channels)
    weight, bias = torch.randn(2, channels, generator=generator, dtype=torch.float64) * 2
    if channels > 2:
        weight[0], weight[1] = 0, -1.5
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    return weight.to(DEVICE, statistics), bias.to(DEVICE, statistics)


def by_channel(x: Tensor) -> "list[np.ndarray[Any, Any]]":
    """The samples of each channel in float64, in numpy."""
    return [np.ascontiguousarray(x.detach().double().cpu().select(1, c).numpy()).ravel() for c in range(x.shape[1])]


def exact_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel: exact sums (math.fsum) of float64 numbers."""
    means = [math.fsum(channel) / len(channel) for channel in by_channel(x)]
    variances = [
        math.fsum((channel - mean) ** 2) / len(channel) for channel, mean in zip(by_channel(x), means, strict=True)
    ]
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


class Step(NamedTuple):
    """Everything that a training step computes, or that it should."""

    output: Tensor
    grad_x: Tensor
    grad_residual: Tensor | None
    grad_weight: Tensor
    grad_bias: Tensor


def expected(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str | None, residual: Tensor | None, grad: Tensor
) -> Step:
    """The step in float64 on the CPU, by autograd of the formula."""
    x, weight, bias = (t.detach().cpu().double().clone().requires_grad_() for t in (x, weight, bias))
    leaf = None if residual is None else residual.detach().cpu().double().clone().requires_grad_()
    dims = [dim for dim in range(x.ndim) if dim != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    centred = x - x.mean(dims, keepdim=True)
    normalized = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
    pre = normalized * weight.view(shape) + bias.view(shape)
    output = ACTIVATIONS[activation](pre if leaf is None else pre + leaf)
    inputs = [x, weight, bias] if leaf is None else [x, weight, bias, leaf]
    grads = torch.autograd.grad(output, inputs, grad.cpu().double())
    return Step(output.detach(), grads[0], None if leaf is None else grads[3], grads[1], grads[2])


def torchs(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str | None, residual: Tensor | None, grad: Tensor
) -> Step:
    """The step by torch's own operations in x's dtype."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    leaf = None if residual is None else residual.detach().clone().requires_grad_()
    # Of a single sample torch refuses to take statistics; its own formula then.
    normalized = (
        F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
        if x.numel() > x.shape[1]
        else torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)[0]
    )
    output = ACTIVATIONS[activation](normalized if leaf is None else normalized + leaf)
    inputs = [x, weight, bias] if leaf is None else [x, weight, bias, leaf]
    grads = torch.autograd.grad(output, inputs, grad)
    return Step(output.detach(), grads[0], None if leaf is None else grads[3], grads[1], grads[2])


def settled(x: Tensor, eps: float = 1e-5, statistics: Any = None) -> Tensor:
    """The table of numbers of x, or of given statistics (3, C)."""
    mean, lost, variance = (B.moments(x) if statistics is None else statistics).unbind()
    numbers: Tensor = B.settle(mean, lost, variance, eps, mean.dtype)
    return numbers


def ours(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str | None, residual: Tensor | None, grad: Tensor
) -> Step:
    """The step by the kernels; from the output where the contract says so."""
    numbers = settled(x, eps)
    output = B.apply(x, numbers, weight, bias, activation, residual)
    known = output if residual is not None else None
    sums = B.gradient_sums(grad, x, numbers, weight, bias, activation, known, residual)
    grad_weight, grad_bias, factors = B.settle_gradients(sums, numbers, x.numel() // x.shape[1])
    grad_x, grad_residual = B.input_gradient(
        grad, x, numbers, weight, bias, factors, activation, known, residual, want_residual=residual is not None
    )
    if residual is not None and activation is None:
        assert grad_residual is None
        grad_residual = grad
    return Step(output, grad_x, grad_residual, grad_weight, grad_bias)


def error(found: Tensor | None, right: Tensor | None) -> float:
    if found is None or right is None:
        assert found is right
        return 0.0
    return float((found.detach().cpu().double() - right).abs().max())
