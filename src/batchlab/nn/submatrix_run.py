"""One pass through a chain of layers that computes the kept features alone, or all of them and masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.functional.submatrix import select_features, submatrix, touched
from batchlab.functional.submatrix_linear import KeptLinear, chain_of_kept
from batchlab.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchlab.nn.batchwise_dropout import BatchwiseDropout, apply_mask
from batchlab.nn.submatrix_draw import draw_ahead
from batchlab.nn.submatrix_layers import (
    Step,
    convolution_dimensions,
    dropout_ahead,
    is_homogeneous,
    keeps_zero,
    pooling_dimensions,
)
from batchlab.reference import batchwise_dropout as reference

__all__ = ["run_masked", "run_submatrix"]


def feature_dim(module: nn.Module, kind: str, ndim: int) -> int:
    """The feature dimension of a linear or convolution layer's input and output."""
    return ndim - 1 if kind == "linear" else ndim - 1 - convolution_dimensions(module)


def num_outputs(module: Any, kind: str) -> int:
    """Features that a linear or convolution layer puts out."""
    return int(module.out_features if kind == "linear" else module.out_channels)


def _convolve(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # torch's own, which knows the padding modes.
    return module._conv_forward(x, weight, bias)  # type: ignore[no-any-return]


class Compact:
    """An activation of which some features are left out.

    Attributes:
        pending: linear layers that are still to be computed, together, when somebody asks for `x`.
        ndim: number of dimensions of x.
        kept: which features x has; None: all are there.
        num_features: how many there would be.
        dim: the feature dimension.
        scale: a factor that x still has to be multiplied by.
        dropped: the others are zero, a dropout has passed; before it, they are not needed.
    """

    __slots__ = ("_x", "device", "dim", "dropped", "kept", "ndim", "num_features", "pending", "scale")

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self.ndim = x.ndim
        self.device = x.device
        self.pending: list[KeptLinear] = []
        self.kept: Tensor | None = None
        self.num_features = 0
        self.dim = 0
        self.scale = 1.0
        self.dropped = False

    @property
    def x(self) -> Tensor:
        """The values of the kept features."""
        if self.pending:
            self._x = chain_of_kept(self._x, self.pending)
            self.pending = []
        return self._x

    @x.setter
    def x(self, value: Tensor) -> None:
        self._x, self.ndim = value, value.ndim

    def rescale(self) -> None:
        """Multiply by the factor that is due."""
        if self.scale != 1:
            self.x = self.x * self.scale
            self.scale = 1.0

    def expand(self) -> None:
        """Make it dense, with zeros at the dropped features."""
        self.rescale()
        if self.kept is not None:
            self.x = reference.expand(self.x, self.kept, self.num_features, self.dim)
            self.kept = None


def _factor_can_wait(steps: list[Step], index: int) -> bool:
    """Whether everything up to the next linear or convolution layer lets a positive factor pass."""
    for _, module, kind in steps[index + 1 :]:
        if kind in ("linear", "convolution"):
            return True
        passes = kind in ("flatten", "pooling") or is_homogeneous(module)
        if not passes and not (kind == "dropout" and not module.active):
            return False
    return False


def _relu_follows(steps: list[Step], index: int) -> bool:
    """Whether the next module is a ReLU and nothing else, which the product can take along."""
    if index + 1 == len(steps):
        return False
    _, module, kind = steps[index + 1]
    return type(module) is nn.ReLU and kind == "elementwise"


def _produce(a: Compact, module: Any, kind: str, rows: Tensor | None, relu: bool) -> None:
    if kind == "linear":
        # nn.Module's attributes are a search, which every layer of every batch would make; a replica's are ordinary.
        own = module._parameters
        weight = own["weight"] if "weight" in own else module.weight  # noqa: SIM401 - get() would search, too
        bias = own["bias"] if "bias" in own else module.bias  # noqa: SIM401
        a.pending.append(KeptLinear(weight, bias, rows, a.kept, a.scale, relu))
    else:
        block, bias = submatrix(module.weight, module.bias, rows, a.kept)
        a.x = _convolve(module, a.x, block * a.scale if a.scale != 1 else block, bias)
    a.kept, a.scale, a.dropped = rows, 1.0, False


def _normalize(module: Any, x: Tensor, mean: Tensor | None, var: Tensor | None, affine: Any) -> tuple[Tensor, bool]:
    """A batch norm's forward on given tensors; returns the output, and whether `mean` and `var` were updated."""
    if isinstance(module, (BatchNorm1d, BatchNorm2d, BatchNorm3d)):
        y = module.normalize(x, mean, var, *affine)
        return y, module.training and module.update_statistics
    batch_statistics = module.training or mean is None
    updated = module.training and module.track_running_stats
    if updated and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    statistics = (mean, var) if updated or not module.training else (None, None)
    momentum = module.momentum or 0.0
    return F.batch_norm(x, *statistics, affine[0], affine[1], batch_statistics, momentum, module.eps), updated


def _normalize_kept(module: Any, x: Tensor, kept: Tensor) -> Tensor:
    """Batch norm of kept channels: their parameters and running statistics alone are read and changed."""
    affine = (module.weight, module.bias)
    if module.weight is not None:
        affine = submatrix(module.weight, module.bias, kept, None)
    mean, var = module.running_mean, module.running_var
    if mean is None:
        return _normalize(module, x, None, None, affine)[0]
    own_mean, own_var = mean.index_select(0, kept), var.index_select(0, kept)
    y, updated = _normalize(module, x, own_mean, own_var, affine)
    if updated:
        mean.index_copy_(0, kept, own_mean)
        var.index_copy_(0, kept, own_var)
    return y


def _normalize_masked(module: Any, x: Tensor, kept: Tensor) -> Tensor:
    """Batch norm of all channels; the running statistics of the kept ones alone change, as in `_normalize_kept`."""
    affine = (module.weight, module.bias)
    if module.weight is not None:
        affine = touched(module.weight, module.bias, kept, None)
    mean, var = module.running_mean, module.running_var
    if mean is None:
        return _normalize(module, x, None, None, affine)[0]
    all_mean, all_var = mean.clone(), var.clone()
    y, updated = _normalize(module, x, all_mean, all_var, affine)
    if updated:
        mean.index_copy_(0, kept, all_mean.index_select(0, kept))
        var.index_copy_(0, kept, all_var.index_select(0, kept))
    return y


def flat_indices(kept: Tensor, inner: int) -> Tensor:
    """Kept flattened features: a dropped feature map takes its whole block of `inner` with it."""
    if inner == 1:
        return kept
    return (kept.unsqueeze(1) * inner + torch.arange(inner, device=kept.device)).view(-1)


def _flatten_kept(a: Compact, kept: Tensor) -> None:
    inner = math.prod(a.x.shape[2:])
    a.kept = flat_indices(kept, inner)
    a.num_features *= inner
    a.x = a.x.flatten(1)


def _pass_on(a: Compact, module: Any, kind: str) -> None:
    """A layer between a producer and a dropout, or between a dropout and the next producer."""
    kept, ndim = a.kept, a.ndim
    if kept is not None:
        if kind == "batch_norm" and not a.dropped:
            a.x = _normalize_kept(module, a.x, kept)
            return
        if kind == "prelu" and module.num_parameters > 1 and a.dim == 1:
            a.x = F.prelu(a.x, submatrix(module.weight, None, kept, None)[0])
            return
        if kind == "flatten" and ndim > 2 and a.dim == 1:
            _flatten_kept(a, kept)
            return
        fits = (
            (kind == "elementwise" and (not a.dropped or keeps_zero(module)))
            or (kind == "prelu" and module.num_parameters == 1)
            or (kind == "flatten" and ndim == 2)
            or (kind == "pooling" and a.dim == ndim - 1 - pooling_dimensions(module))
        )
        if not fits:
            a.expand()
    in_place = getattr(module, "inplace", False)
    if a.scale != 1 and kind not in ("flatten", "pooling") and (in_place or not is_homogeneous(module)):
        a.rescale()
    elif in_place and a.dropped:
        a.x = a.x.clone()  # a dropout makes a new tensor; without one this would be the saved output of a layer
    a.x = module(a.x)


def _prepare(a: Compact, module: BatchwiseDropout) -> None:
    """Get all features, for a dropout whose pattern no layer in front of it could use."""
    a.expand()
    a.dim = module.feature_dim(a.x)
    a.num_features = a.x.shape[a.dim]


def _drop(a: Compact, kept: Tensor, scale: float) -> None:
    """Apply a dropout: to features that were left out already, or to ones that are all there."""
    if a.kept is None:
        a.kept, a.x = kept, select_features(a.x, kept, a.dim)
    a.scale *= scale
    a.dropped = True


def _skip(a: Compact, module: BatchwiseDropout) -> None:
    """A dropout that drops nothing."""
    if a.kept is None:
        a.x = module(a.x)
    else:
        dim = module.feature_dim(a.x)
        if module.training:
            module.keep_all(a.num_features if dim == a.dim else a.x.shape[dim], a.x.device)
        else:
            module.kept = None


def _masked_from(steps: list[Step], a: Compact, start: int, drawn: dict[int, tuple[Tensor, float]]) -> Tensor:
    columns = None if a.kept is None else (a.kept, a.dim)
    a.expand()
    return run_masked(steps, a.x, start, drawn, columns)


def run_submatrix(steps: list[Step], x: Tensor) -> Tensor:
    """Run the chain on kept rows and columns; what cannot work on kept features gets all, with zeros at the dropped.

    Where a pattern keeps nothing, the rest of the chain is masked: layers refuse tensors without features.
    """
    a = Compact(x)
    drawn = draw_ahead(steps, x)
    ahead: int | None = None  # the dropout whose features the last linear or convolution layer left out
    relu = False
    for index, (_, module, kind) in enumerate(steps):
        if relu:  # done with the layer before it
            relu = False
            continue
        if kind in ("linear", "convolution"):
            dim = feature_dim(module, kind, a.ndim)
            if a.dim != dim:
                a.expand()
            rows = None
            ahead = dropout_ahead(steps, index, a.ndim, dim)
            if ahead is not None:
                if ahead not in drawn:
                    drawn[ahead] = steps[ahead].module.draw(num_outputs(module, kind), a.device)
                rows = drawn[ahead][0]
                if not rows.shape[0]:
                    return _masked_from(steps, a, index, drawn)
            relu = kind == "linear" and _relu_follows(steps, index)
            _produce(a, module, kind, rows, relu)
            a.num_features, a.dim = num_outputs(module, kind), dim
        elif kind == "dropout":
            if not module.active:
                _skip(a, module)
                continue
            if index != ahead:
                _prepare(a, module)
                if index not in drawn:
                    drawn[index] = module.draw(a.num_features, a.device)
                if not drawn[index][0].shape[0]:
                    return _masked_from(steps, a, index, drawn)
            _drop(a, *drawn.pop(index))
            if not _factor_can_wait(steps, index):
                a.rescale()
        else:
            _pass_on(a, module, kind)
    a.expand()
    return a.x


def run_masked(
    steps: list[Step],
    x: Tensor,
    start: int = 0,
    drawn: dict[int, tuple[Tensor, float]] | None = None,
    columns: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Run the chain on all features, with the patterns, running statistics and gradients of `run_submatrix`.

    Args:
        steps: the chain.
        x: input of the first step.
        start: index of the first step.
        drawn: patterns that are drawn already, and their factors.
        columns: what the last dropout kept, and the dimension it is in.
    """
    drawn = draw_ahead(steps, x) if drawn is None else drawn
    rows: Tensor | None = None
    for index in range(start, len(steps)):
        _, module, kind = steps[index]
        if kind in ("linear", "convolution"):
            dim = feature_dim(module, kind, x.ndim)
            ahead = dropout_ahead(steps, index, x.ndim, dim)
            rows = None
            if ahead is not None:
                if ahead not in drawn:
                    drawn[ahead] = steps[ahead].module.draw(num_outputs(module, kind), x.device)
                rows = drawn[ahead][0]
            known = columns[0] if columns is not None and columns[1] == dim else None
            weight, bias = touched(module.weight, module.bias, rows, known)
            x = F.linear(x, weight, bias) if kind == "linear" else _convolve(module, x, weight, bias)
            columns = None
        elif kind == "dropout":
            if not module.active:
                x = module(x)
                continue
            dim = module.feature_dim(x)
            kept, scale = drawn.pop(index, None) or module.draw(x.shape[dim], x.device)
            x = apply_mask(x, kept, scale, dim)
            columns, rows = (kept, dim), None
        else:
            if rows is not None and kind == "batch_norm":
                x = _normalize_masked(module, x, rows)
            elif rows is not None and kind == "prelu" and module.num_parameters > 1:
                x = F.prelu(x, touched(module.weight, None, rows, None)[0])
            elif columns is not None and columns[1] == 1 and kind == "prelu" and module.num_parameters > 1:
                x = F.prelu(x, touched(module.weight, None, columns[0], None)[0])
            elif columns is not None and kind == "flatten" and x.ndim > 2 and columns[1] == 1:
                columns = flat_indices(columns[0], math.prod(x.shape[2:])), 1
                x = module(x)
            else:
                passes = (
                    (kind == "prelu" and module.num_parameters == 1)
                    or (kind == "elementwise" and keeps_zero(module))
                    or (kind == "flatten" and x.ndim == 2)
                    or (
                        kind == "pooling"
                        and columns is not None
                        and columns[1] == x.ndim - 1 - pooling_dimensions(module)
                    )
                )
                if not passes:
                    columns = None
                x = module(x)
    return x
