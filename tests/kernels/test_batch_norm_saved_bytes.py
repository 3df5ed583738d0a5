"""What a layer and its ReLU keep for the backward pass: no more bytes than torch's batch normalization by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from batchlab import nn
from batchlab.kernels import batch_norm as kernel

pytestmark = pytest.mark.skipif(not kernel.available(), reason="there is no C++ compiler")


def _saved(layer: torch.nn.Module, x: Tensor) -> int:
    """Bytes of all tensors that the graph of layer(x) keeps."""
    sizes: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        sizes.append(saved.numel() * saved.element_size())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x.detach().requires_grad_())
    return sum(sizes)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "sigmoid", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["rows", "planes", "channels-last"])
def test_no_more_than_torchs_normalization_alone(place: str, dtype: torch.dtype, activation: str | None) -> None:
    x = torch.randn((60, 100) if place == "rows" else (8, 64, 14, 14)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if place == "channels-last" else x
    width = torch.float64 if dtype == torch.float64 else torch.float32
    ours, theirs = (
        (module.BatchNorm1d if x.ndim == 2 else module.BatchNorm2d)(x.shape[1], dtype=width, **options)
        for module, options in ((nn, {"activation": activation, "backend": "fused"}), (torch.nn, {}))
    )
    found, alone = _saved(ours, x), _saved(theirs, x)
    assert found <= alone
    assert found >= x.numel() * x.element_size()  # the hooks did see what is kept
    if activation == "relu":
        both = _saved(torch.nn.Sequential(theirs, torch.nn.ReLU()), x)
        assert both - found >= x.numel() * x.element_size()
