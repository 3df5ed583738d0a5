"""Batch normalization layers (Ioffe & Szegedy 2015): torch's, with two switches, masks, ranks and exact statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm

from batchlab import functional
from batchlab.functional.activation import check_activation
from batchlab.functional.running_statistics import check_momentum, check_nonfinite
from batchlab.nn.running_statistics import RunningStatistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _GroupReference:
    """A process group as a layer holds it: copies of the layer share it, and it cannot go into a file."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer with a process_group cannot be pickled, because a process group exists in this process only: "
            "save model.state_dict(), or set layer.process_group = None first"
        )


class _BatchNorm(RunningStatistics, _TorchBatchNorm):
    """What the three layers share; the arguments are explained at `BatchNorm1d`."""

    # Class-level defaults let layers load that were pickled before an option existed.
    activation: str | None = None
    nonfinite: str = "propagate"
    backend: str = "auto"
    _group: _GroupReference | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        nonfinite: str = "propagate",
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        check_activation(activation)
        check_nonfinite(nonfinite)
        check_momentum(momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # torch's own argument is younger than the oldest torch that this runs on
            self.register_parameter("bias", None)
        self.activation = activation
        self.nonfinite = nonfinite
        self.process_group = process_group
        self.backend = backend
        self.widen_statistics()

    @property
    def process_group(self) -> ProcessGroup | None:
        """The group whose ranks share their batch statistics; None: this process alone."""
        return None if self._group is None else self._group.group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._group = None if group is None else _GroupReference(group)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize, add the residual, activate.

        Args:
            x: the input, channels in dimension 1.
            residual: x's shape; added before the activation.
            mask: bool, broadcastable to (N, 1, ...), True where an entry is valid; padded outputs are 0.
        """
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        mean, var = self._own("running_mean", self._buffers), self._own("running_var", self._buffers)
        weight, bias = self._own("weight", self._parameters), self._own("bias", self._parameters)
        return self.normalize(x, mean, var, weight, bias, residual, mask)

    def _own(self, name: str, own: Mapping[str, Tensor | None]) -> Tensor | None:
        # As an attribute, nn.Module finds it after it has looked everywhere else, a microsecond later; but a
        # parametrized weight is an attribute only.
        return own[name] if name in own else getattr(self, name)

    def normalize(
        self,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What `forward` does, on tensors that are given instead of the layer's own: those of some channels, say.

        Args:
            x: the input, channels in dimension 1.
            mean: running mean, updated in place where the layer updates its own.
            var: running variance, likewise.
            weight: scale of each channel.
            bias: shift of each channel.
            residual: see `forward`.
            mask: see `forward`.
        """
        use_batch, update = self.switches(mean)
        keep_out = use_batch and not update
        batches = self._buffers.get("num_batches_tracked") if update else None
        y = functional.batch_norm(
            x,
            None if keep_out else mean,
            None if keep_out else var,
            weight,
            bias,
            use_batch,
            self.momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            mask=mask,
            process_group=self.process_group,
            backend=self.backend,
            nonfinite=self.nonfinite,
            num_batches_tracked=batches,
        )
        if update and not use_batch and mean is not None and var is not None:
            functional.update_running_statistics(
                x,
                mean,
                var,
                self.momentum,
                mask=mask,
                process_group=self.process_group,
                nonfinite=self.nonfinite,
                num_batches_tracked=batches,
            )
        return y

    def extra_repr(self) -> str:
        """Torch's line, then every option that is not at its default."""
        options = {
            "activation": (self.activation, None),
            "nonfinite": (self.nonfinite, "propagate"),
            "backend": (self.backend, "auto"),
        }
        changed = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        changed += self.changed_switches()
        if self.process_group is not None:
            changed.append(f"process_group={self.process_group.size()} ranks")
        return ", ".join([super().extra_repr(), *changed])  # type: ignore[no-untyped-call]


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch normalization over (N, C) or (N, C, L), a drop-in for `torch.nn.BatchNorm1d`.

    training:    y = act(weight · (x - μ) / √(σ² + eps) + bias + residual),  μ, σ² of the batch
                 running ← (1 - momentum) · running + momentum · (μ, n/(n-1) σ²)
    evaluation:  the same with the running statistics

    Parameters, buffers and state-dict keys are torch's, and loading is strict both ways. What torch's layer has not:

    * Two switches, both attributes, both in `repr` when changed. `statistics` says which statistics normalize: "auto"
      (batch in training, running in evaluation), "batch" or "running". `update_statistics` says whether training
      updates the running ones. A frozen layer is `statistics = "running"` with `update_statistics = False`; it
      survives `model.train()`.
    * Statistics are float32 or wider whatever the input, and stay so under `.half()` and `.bfloat16()`; outputs and
      gradients keep their digits where mean/std is large.
    * An empty batch passes through and counts nothing.

    Shapes:
        input, residual, output: (N, C) or (N, C, L), any floating dtype.
        mask: bool, broadcastable to (N, 1) or (N, 1, L).

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; None: the plain average over all batches.
        affine: learn weight (γ, starts at 1) and bias (β, starts at 0).
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of parameters; statistics are never narrower than float32.
        bias: with `affine`, learn the bias too.
        activation: None, "relu", "leaky_relu", "silu" or "sigmoid", applied last.
        nonfinite: what an inf or NaN in a batch does to the running statistics: "propagate" (as torch), "skip" the
            affected channels, or "raise".
        process_group: statistics over all ranks of the group, on any backend, uneven and empty ranks included.
        backend: see `batchlab.functional.batch_norm`.

    Raises:
        ValueError: an unknown option; in forward, a shape that does not fit or a batch with one value per channel.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.

    >>> import torch
    >>> layer = BatchNorm1d(3, activation="relu")
    >>> layer(torch.randn(8, 3)).shape
    torch.Size([8, 3])
    >>> layer.statistics, layer.update_statistics = "running", False      # frozen
    >>> layer
    BatchNorm1d(3, eps=1e-05, ..., activation='relu', statistics='running', update_statistics=False)
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization over (N, C, H, W), one statistic per feature map; see `BatchNorm1d` for everything else.

    >>> import torch
    >>> BatchNorm2d(3)(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 3, 5, 5])
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization over (N, C, D, H, W), one statistic per feature map; see `BatchNorm1d` for everything else.

    >>> import torch
    >>> BatchNorm3d(3)(torch.randn(2, 3, 4, 5, 5)).shape
    torch.Size([2, 3, 4, 5, 5])
    """
