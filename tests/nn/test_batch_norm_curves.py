"""Whole networks learn the same with plain operations and with the kernel."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from batchlab import nn
from batchlab.kernels import batch_norm as kernel
from batchlab.lab.data import load_embedded

STEPS = 40


class Residual(torch.nn.Module):
    """A batch norm in front of everything a fused one can take over: the residual and the activation."""

    def __init__(self, normalize: Callable[..., torch.nn.Module], activation: str) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = normalize(8, activation=activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.convolution(x), residual=x)
        return y


def network(backend: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(3)

    def normalize(features: int, activation: str) -> torch.nn.Module:
        return nn.BatchNorm2d(features, activation=activation, backend=backend)

    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, stride=2, bias=False),
        normalize(8, "relu"),
        Residual(normalize, "silu"),
        torch.nn.Conv2d(8, 8, 3, stride=2, bias=False),
        Residual(normalize, "relu"),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 5 * 5, 32, bias=False),
        nn.BatchNorm1d(32, activation="sigmoid", backend=backend),
        torch.nn.Linear(32, 10),
    ).to(dtype)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_reference_and_kernel_have_the_same_curve(
    dtype: torch.dtype, apart: float, memory_format: torch.memory_format
) -> None:
    if not kernel.available():
        pytest.skip("there is no C++ compiler")
    digits = load_embedded()
    count = STEPS * 32
    images = digits.train_images[:count, None] / 255
    labels = digits.train_labels[:count]
    losses: dict[str, list[torch.Tensor]] = {}
    evaluated = {}
    for backend in ("reference", "auto"):
        model = network(backend, dtype).to(memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses[backend] = []
        for x, target in zip(images.to(dtype).split(32), labels.split(32), strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(memory_format=memory_format)), target)
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.detach())
        with torch.no_grad():
            evaluated[backend] = model.eval()(images[:64].to(dtype))
    reference, fused = (torch.stack(losses[name]) for name in ("reference", "auto"))
    assert reference[-1] < 0.7 * reference[0]
    assert torch.allclose(reference, fused, rtol=0, atol=apart)
    assert torch.allclose(evaluated["reference"], evaluated["auto"], rtol=0, atol=20 * apart)
