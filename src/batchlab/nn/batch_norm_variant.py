"""What variants of batch normalization share that differ from it in training alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm

from batchlab import functional
from batchlab.functional.running_statistics import check_momentum, check_nonfinite
from batchlab.nn.running_statistics import RunningStatistics

__all__ = ["BatchNormVariant"]


class BatchNormVariant(RunningStatistics, _TorchBatchNorm):
    """Torch's arguments, parameters and buffers; subclasses say what normalizing a batch means.

    With the running statistics it is batch normalization: in evaluation, and where `statistics` says so.
    """

    nonfinite: str = "propagate"

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
        nonfinite: str = "propagate",
    ) -> None:
        check_momentum(momentum)
        check_nonfinite(nonfinite)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.nonfinite = nonfinite
        self.widen_statistics()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the input, channels in dimension 1."""
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        mean, var = self.running_mean, self.running_var
        use_batch, update = self.switches(mean)
        if use_batch:
            return self.normalize_batch(x, update)
        y = functional.batch_norm(x, mean, var, self.weight, self.bias, False, self.momentum, self.eps)
        if update and mean is not None and var is not None:
            functional.update_running_statistics(
                x, mean, var, self.momentum, nonfinite=self.nonfinite, num_batches_tracked=self.num_batches_tracked
            )
        return y

    def normalize_batch(self, x: Tensor, update: bool) -> Tensor:
        """Normalize with the batch's own statistics, as the mechanism does; `update`: move the running ones."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Torch's line, then every option that is not at its default."""
        words = [super().extra_repr()]  # type: ignore[no-untyped-call]
        if self.nonfinite != "propagate":
            words.append(f"nonfinite={self.nonfinite!r}")
        return ", ".join([*words, *self.changed_switches()])
