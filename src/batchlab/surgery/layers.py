"""Which layers surgery knows: the linear ones that a normalization can follow or join, and the normalizations."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from batchlab import nn as layers
from batchlab.nn.partial_batch_norm import PartialBatchNorm
from batchlab.nn.running_statistics import RunningStatistics

__all__ = [
    "LAYERS",
    "NORMS",
    "ChannelNorm",
    "LayerKind",
    "Norm",
    "Normalization",
    "exact_kind",
    "has_statistics",
    "is_linear_or_conv",
    "kind_of",
    "own_type",
    "running_statistics",
]

Norm = _BatchNorm  # what torch's, SyncBatchNorm's and batchlab's layers have in common
"""Every batch normalization layer."""

ChannelNorm = _BatchNorm | PartialBatchNorm
"""Every layer that in evaluation is s·x + t per channel, by running statistics: those, and mean or variance alone."""

Normalization = _BatchNorm | RunningStatistics
"""Every layer that in training normalizes by the batch's statistics: those, and whitening."""


class LayerKind(NamedTuple):
    """How a linear layer uses its weight: number of spatial dimensions (0: linear), and whether it is transposed."""

    spatial: int
    transposed: bool


LAYERS: Final[dict[type[nn.Module], LayerKind]] = {
    nn.Linear: LayerKind(0, False),
    nn.Conv1d: LayerKind(1, False),
    nn.Conv2d: LayerKind(2, False),
    nn.Conv3d: LayerKind(3, False),
    nn.ConvTranspose1d: LayerKind(1, True),
    nn.ConvTranspose2d: LayerKind(2, True),
    nn.ConvTranspose3d: LayerKind(3, True),
}

# Variants of batch normalization differ from it in training alone.
_OWN: Final = (
    "BatchNorm",
    "GhostBatchNorm",
    "BatchRenorm",
    "NoisyBatchNorm",
    "PopulationBatchNorm",
    "MeanOnlyBatchNorm",
    "VarianceOnlyBatchNorm",
)

NORMS: Final[tuple[type[nn.Module], ...]] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(getattr(layers, f"{name}{dimensions}d") for name in _OWN for dimensions in (1, 2, 3)),
)
"""Classes whose evaluation is known."""


def running_statistics(norm: ChannelNorm) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance; None for what the layer does not have."""
    return getattr(norm, "running_mean", None), getattr(norm, "running_var", None)


def has_statistics(norm: ChannelNorm) -> bool:
    """Say whether a layer has all of its kind's running statistics."""
    found = running_statistics(norm)
    return None not in found if isinstance(norm, Norm) else found != (None, None)


def own_type(module: nn.Module) -> type[nn.Module]:
    """Return the module's class, without the one that a parametrization puts before it."""
    return parametrize.type_before_parametrizations(module)


def exact_kind(module: nn.Module) -> LayerKind | None:
    """Return how a layer of a known class uses its weight; None for any other class, subclasses too."""
    return LAYERS.get(own_type(module))


def kind_of(module: nn.Module) -> LayerKind | None:
    """Like `exact_kind`, but a subclass counts as the class it extends."""
    return next((kind for cls, kind in LAYERS.items() if isinstance(module, cls)), None)


def is_linear_or_conv(module: nn.Module) -> bool:
    """Say whether `module` is a linear or convolution layer, of a known class or not."""
    return isinstance(module, (nn.Linear, _ConvNd))
