"""Putting planned normalizations into a model, in place, and taking them out again if anything fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from torch import Tensor, nn

from batchlab.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchlab.surgery.insertion_plan import Insertion
from batchlab.surgery.layers import exact_kind, kind_of

__all__ = ["insert", "undone_on_exception"]

NORM_BY_SPATIAL: Final = {0: BatchNorm1d, 1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}


def _norm_for(layer: nn.Module, eps: float, momentum: float | None) -> nn.Module:
    kind, weight = kind_of(layer), layer.weight
    if kind is None or not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} is not a linear or convolution layer")
    features = int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]
    norm = NORM_BY_SPATIAL[kind.spatial](features, eps, momentum, device=weight.device, dtype=weight.dtype)
    return norm.train(layer.training)


def _drop_bias(layer: nn.Module) -> None:
    # A class that is not known may use its bias for something else, and a parametrized bias is not a parameter.
    if exact_kind(layer) is not None and "bias" in layer._parameters:
        layer.register_parameter("bias", None)


def _new_key(key: str, taken: set[str]) -> str:
    new = f"{key}_norm"
    while new in taken:
        new += "_"
    return new


def insert(model: nn.Module, insertions: list[Insertion], eps: float, momentum: float | None) -> list[nn.Module]:
    """Put one normalization after each planned layer, drop the layer's bias, and return the normalizations."""
    norms = []
    by_parent: dict[str, dict[str, Insertion]] = {}
    for insertion in insertions:
        parent_name, _, key = insertion.layer.rpartition(".")
        by_parent.setdefault(parent_name, {})[key] = insertion
    # Looked up before anything changes: a flat insertion renumbers what follows it.
    for children, planned in [(model.get_submodule(name)._modules, planned) for name, planned in by_parent.items()]:
        numbered = list(children) == [str(i) for i in range(len(children))]
        changed: list[tuple[str, nn.Module | None]] = []
        for key, child in children.items():
            if child is None or key not in planned:
                changed.append((key, child))
                continue
            norm = _norm_for(child, eps, momentum)
            norms.append(norm)
            _drop_bias(child)
            if planned[key].flat:
                changed += [(key, child), (_new_key(key, set(children)), norm)]
            else:
                changed.append((key, nn.Sequential(child, norm).train(child.training)))
        if numbered:
            changed = [(str(i), child) for i, (_, child) in enumerate(changed)]
        children.clear()
        children.update(changed)
    return norms


@contextmanager
def undone_on_exception(model: nn.Module) -> Iterator[None]:
    """Give every module its children and its parameters back if the block raises, whatever it raises."""
    before = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, children, parameters in before:
            for current, old in ((module._modules, children), (module._parameters, parameters)):
                current.clear()
                current.update(old)  # type: ignore[arg-type]
        raise
