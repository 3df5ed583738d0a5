"""All patterns of a chain in one call, where nothing between its dropouts could draw random numbers of its own."""

from __future__ import annotations

from torch import Tensor

from batchlab.functional.dropout_pattern import draw_counts, kept_count
from batchlab.functional.submatrix import transformed
from batchlab.nn.submatrix_layers import Step

__all__ = ["draw_ahead"]


def draw_ahead(steps: list[Step], x: Tensor) -> dict[int, tuple[Tensor, float]]:
    """Each active dropout's pattern and factor, by its index: those that the dropouts would draw one by one.

    Empty where they must do so: beside linear layers and activations there is something else, a dropout has a
    generator of its own or drops each feature for itself, features are not in the last dimension, or a device or a
    transform needs more than a plain draw.
    """
    if not x.is_cpu or transformed():
        return {}
    ndim = x.ndim
    features = x.shape[-1] if ndim else 0
    places, sizes, counts = [], [], []
    for index, (_, module, kind) in enumerate(steps):
        if kind == "linear":
            features = module.out_features
        elif kind == "dropout":
            if not module.training or not module.p:
                continue
            if module.generator is not None or not module.exact or module.dim not in (ndim - 1, -1):
                return {}
            places.append(index)
            sizes.append(features)
            counts.append(kept_count(features, module.p))
        elif kind != "elementwise":
            return {}
    patterns = draw_counts(sizes, counts)
    return {
        index: steps[index].module.keep(kept, size) for index, size, kept in zip(places, sizes, patterns, strict=True)
    }
