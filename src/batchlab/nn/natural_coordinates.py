"""Coordinates of a natural layer, U and c: where they start, what they become, and V and d in new ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from batchlab.functional import whitening_matrix
from batchlab.functional.running_statistics import check_momentum
from batchlab.reference import natural as reference
from batchlab.reference.batch_norm import statistics_dtype

__all__ = [
    "COLLECTED",
    "COORDINATES",
    "check_natural",
    "first_buffers",
    "new_coordinates",
    "reprojected",
]

COORDINATES: Final = ("whitening", "center")
COLLECTED: Final = ("collected_count", "collected_mean", "collected_m2")


def check_natural(eps: float, momentum: float | None) -> None:
    """Raise ValueError unless these settings make a natural layer."""
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(
            f"eps is {eps}; it must be above 0, because features that are constant or repeated make the covariance "
            "singular"
        )
    check_momentum(momentum)
    if momentum == 0:
        raise ValueError("momentum is 0: nothing new would count at a refresh; 1 uses what is new alone, None all")


def first_buffers(v: Tensor) -> dict[str, Tensor]:
    """The buffers of a layer with this V where it starts: U = I, c = 0, nothing collected."""
    wide, features = {"dtype": statistics_dtype(v.dtype), "device": v.device}, v.shape[1]
    # Collected in float64, as all covariances here: in float32 the smallest eigenvalues would be rounding.
    # The count has a dimension because compiled code loses what is written into float64 tensors without (torch 2.13).
    zero = torch.zeros(1, dtype=torch.float64, device=v.device)
    coordinates = (torch.eye(features, **wide), torch.zeros(features, **wide))  # type: ignore[call-overload]
    collected = (zero, zero.new_zeros(features), zero.new_zeros(features, features))
    return dict(zip((*COORDINATES, *COLLECTED), (*coordinates, *collected), strict=True))


def new_coordinates(group: reference.CoMoments, centered: bool, eps: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """U and c of what was collected, in the dtype in which they are stored, that of `like`."""
    sigma = reference.second_moment(group, centered)
    rounding = torch.finfo(like.dtype).eps * float(sigma.trace())
    whitening = whitening_matrix(sigma[None], max(eps, rounding))[0]
    center = group.mean if centered else torch.zeros_like(group.mean)
    # Rounded here: V and d must fit to these and not to what they were before.
    return whitening.to(like.dtype), center.to(like.dtype)


def _check_pair(pair: tuple[Tensor | None, Tensor | None], own: tuple[Tensor, Tensor | None]) -> None:
    for given, expected in zip(pair, own, strict=True):
        if given is not None and (expected is None or given.shape != expected.shape):
            shape = "none" if expected is None else tuple(expected.shape)
            raise ValueError(f"`also` holds a tensor of shape {tuple(given.shape)} where the layer's own is {shape}")


def reprojected(
    own: tuple[Tensor, Tensor | None],
    also: Iterable[tuple[Tensor | None, Tensor | None]],
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """What to write where, so that each pair (v, d) means with the new coordinates what it meant with the old.

    Raises:
        ValueError: a value is too large for its dtype, or a shape does not fit.
    """
    writes = []
    for v, d in [own, *also]:
        _check_pair((v, d), own)
        projected = reference.reproject(torch.zeros_like(own[0]) if v is None else v, d, old, new)
        for target, value in zip((v, d), projected, strict=True):
            if target is None or value is None:
                continue
            stored = value.to(target.dtype)
            if bool(target.isfinite().all()) and not bool(stored.isfinite().all()):
                raise ValueError(
                    f"a refresh needs values that {target.dtype} does not hold; nothing was changed. Keep this layer "
                    "in float32 or bfloat16"
                )
            writes.append((target, stored))
    return writes
