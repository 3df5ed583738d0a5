"""What a `SubmatrixSequential` knows of the layers in it: which can work on kept features alone, and how."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from torch import nn

from batchlab.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchlab.nn.batchwise_dropout import BatchwiseDropout

__all__ = [
    "Step",
    "batch_norm_dimensions",
    "convolution_dimensions",
    "dropout_ahead",
    "flatten",
    "is_homogeneous",
    "keeps_zero",
    "kind_of",
    "pooling_dimensions",
]

CONVOLUTIONS: Final[dict[type, int]] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}

BATCH_NORMS: Final[dict[type, tuple[int, ...]]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    BatchNorm1d: (2, 3),
    BatchNorm2d: (4,),
    BatchNorm3d: (5,),
}
"""Number of dimensions of their inputs, with channels in dimension 1."""

POOLINGS: Final[dict[type, int]] = {
    nn.MaxPool1d: 1,
    nn.MaxPool2d: 2,
    nn.MaxPool3d: 3,
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
    nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2,
    nn.AdaptiveMaxPool3d: 3,
}

HOMOGENEOUS: Final = frozenset({nn.Identity, nn.ReLU, nn.LeakyReLU})
"""f(a x) = a f(x) for a > 0."""

ZERO_AT_ZERO: Final = HOMOGENEOUS | {
    nn.Tanh,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ReLU6,
    nn.Hardswish,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Softshrink,
    nn.Hardshrink,
}

ELEMENTWISE: Final = ZERO_AT_ZERO | {nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Hardsigmoid, nn.Hardtanh}

FIXED_KINDS: Final[dict[type, str]] = {
    nn.Linear: "linear",
    BatchwiseDropout: "dropout",
    nn.PReLU: "prelu",
    **dict.fromkeys(ELEMENTWISE, "elementwise"),
}


class Step(NamedTuple):
    """A module of the chain: by its name in the container, and how it is taken (see `kind_of`)."""

    name: str
    module: Any
    kind: str


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward, or something else."""
    own = module.__dict__  # every module of every batch is asked
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def kind_of(module: Any) -> str:
    """How a module is taken: by a name of what it does to features, or "opaque": on all features, as it is.

    Exact types only: a subclass may do anything. So may a hook, or a forward of the instance's own.
    """
    cls = type(module)
    kind = FIXED_KINDS.get(cls)
    if kind is None:
        if cls in CONVOLUTIONS:
            kind = "convolution" if module.groups == 1 else "opaque"
        elif cls in BATCH_NORMS:
            kind = "batch_norm"
        elif cls in POOLINGS:
            kind = "opaque" if getattr(module, "return_indices", False) else "pooling"
        elif cls is nn.Flatten:
            kind = "flatten" if (module.start_dim, module.end_dim) == (1, -1) else "opaque"
        else:
            return "opaque"
    return "opaque" if has_hooks(module) else kind


def flatten(container: nn.Sequential, chains: frozenset[type], prefix: str = "") -> list[Step]:
    """The modules of nested Sequentials, in the order in which they run.

    Args:
        container: the outermost one.
        chains: types of containers that are looked into.
        prefix: of the names.
    """
    steps = []
    for name, module in container._modules.items():
        fixed = FIXED_KINDS.get(type(module))
        if fixed is not None:  # most of them: without a further look
            steps.append(Step(prefix + name, module, "opaque" if has_hooks(module) else fixed))
        elif type(module) in chains and isinstance(module, nn.Sequential) and not has_hooks(module):
            steps += flatten(module, chains, f"{prefix}{name}.")
        elif module is not None:
            steps.append(Step(prefix + name, module, kind_of(module)))
    return steps


def convolution_dimensions(module: nn.Module) -> int:
    """Number of spatial dimensions of a convolution."""
    return CONVOLUTIONS[type(module)]


def pooling_dimensions(module: nn.Module) -> int:
    """Number of spatial dimensions of a pooling."""
    return POOLINGS[type(module)]


def batch_norm_dimensions(module: nn.Module) -> tuple[int, ...]:
    """Numbers of dimensions that a batch norm's input may have."""
    return BATCH_NORMS[type(module)]


def is_homogeneous(module: nn.Module) -> bool:
    """Whether a positive factor passes through."""
    return type(module) in HOMOGENEOUS or type(module) is nn.PReLU


def keeps_zero(module: Any) -> bool:
    """Whether a dropped feature is still zero afterwards."""
    if isinstance(module, nn.Hardtanh):
        return module.min_val <= 0 <= module.max_val
    return type(module) in ZERO_AT_ZERO


def _splits_by_channel(norm: Any, training: bool) -> bool:
    """Whether some channels of a batch norm can be normalized, and remembered, without the others."""
    if getattr(norm, "process_group", None) is not None:
        return False  # each rank draws patterns of its own
    # A plain average counts batches, and there is one counter for all channels.
    return norm.momentum is not None or not norm.track_running_stats or not training


def dropout_ahead(steps: list[Step], index: int, ndim: int, dim: int, as_training: bool = False) -> int | None:
    """Index of the dropout that decides which outputs of the producer at `index` are needed, if there is one.

    Between the two there may be what treats each feature for itself.

    Args:
        steps: the chain.
        index: of a linear or convolution layer.
        ndim: number of dimensions of its output.
        dim: the output's feature dimension.
        as_training: look at the chain as if it were in training.
    """
    producer = steps[index].module
    for j in range(index + 1, len(steps)):
        _, module, kind = steps[j]
        if kind == "elementwise":
            continue
        if kind == "dropout":
            if not (module.p > 0 if as_training else module.active):
                continue
            return j if (module.dim if module.dim >= 0 else ndim + module.dim) == dim else None
        if kind == "prelu" and (module.num_parameters == 1 or dim == 1):
            continue
        if (
            kind == "batch_norm"
            and dim == 1
            and ndim in batch_norm_dimensions(module)
            and _splits_by_channel(module, as_training or module.training)
        ):
            continue
        if (
            kind == "pooling"
            and type(producer) in CONVOLUTIONS
            and pooling_dimensions(module) == convolution_dimensions(producer)
        ):
            continue
        if kind == "flatten" and ndim == 2:
            continue
        return None
    return None
