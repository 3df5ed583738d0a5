"""What layers share that do one of batch normalization's two steps and have a part of its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from batchlab.functional.running_statistics import check_momentum, check_nonfinite
from batchlab.nn.running_statistics import RunningStatistics
from batchlab.reference.batch_norm import statistics_dtype

__all__ = ["PartialBatchNorm"]


class PartialBatchNorm(RunningStatistics):
    """One running statistic, and of weight and bias what is asked for, under the names that torch's layer gives them.

    Not a subclass of torch's: code that looks for one expects a mean and a variance.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    num_batches_tracked: Tensor | None
    _check_input_dim: ClassVar[Callable[..., None]]  # torch's, for the number of dimensions

    def __init__(
        self,
        num_features: int,
        start: float,
        affine: tuple[str, ...],
        momentum: float | None,
        track_running_stats: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        nonfinite: str,
    ) -> None:
        check_momentum(momentum)
        check_nonfinite(nonfinite)
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.affine = bool(affine)
        self.track_running_stats = track_running_stats
        self.nonfinite = nonfinite
        self.start = start
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if name in affine else None
            self.register_parameter(name, value)
        running, batches = None, None
        if track_running_stats:
            wide = statistics_dtype(dtype or torch.get_default_dtype())
            running = torch.empty(num_features, device=device, dtype=wide)
            batches = torch.tensor(0, dtype=torch.long, device=device)
        (name,) = self.statistics_buffers
        self.register_buffer(name, running)
        self.register_buffer("num_batches_tracked", batches)
        self.reset_parameters()

    @property
    def running(self) -> Tensor | None:
        """The running statistic."""
        value: Tensor | None = getattr(self, self.statistics_buffers[0])
        return value

    def reset_running_stats(self) -> None:
        """Start the running statistic and the counter over."""
        if self.running is not None and self.num_batches_tracked is not None:
            self.running.fill_(self.start)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Start over: weight 1, bias 0, and the running statistic."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the input, channels in dimension 1."""
        self._check_input_dim(x)
        running = self.running
        use_batch, update = self.switches(running)
        batches = self.num_batches_tracked if update else None
        if use_batch:
            return self.normalize(x, running if update else None, batches, True)
        y = self.normalize(x, running, None, False)
        if update:
            with torch.no_grad():  # a batch that moves the statistic and does not normalize
                self.normalize(x, running, batches, True)
        return y

    def normalize(self, x: Tensor, running: Tensor | None, batches: Tensor | None, training: bool) -> Tensor:
        """Call the function with this layer's state; what is None is not moved."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Torch's words, and every option that is not at its default."""
        words = [str(self.num_features)]
        if hasattr(self, "eps"):
            words.append(f"eps={self.eps}")
        words.append(f"momentum={self.momentum}, affine={self.affine}, track_running_stats={self.track_running_stats}")
        if self.nonfinite != "propagate":
            words.append(f"nonfinite={self.nonfinite!r}")
        return ", ".join([*words, *self.changed_switches()])
