"""Batch normalization without the batch: layers that train with the statistics of earlier batches, held for a while."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchlab import functional
from batchlab.functional.batch_norm_checks import check_sample_count
from batchlab.functional.batch_norm_training import samples_per_channel
from batchlab.functional.running_statistics import check_finite
from batchlab.nn.batch_norm_variant import BatchNormVariant
from batchlab.reference.batch_norm import Moments, merge_moments, moments, unbiased_variance

__all__ = ["PopulationBatchNorm1d", "PopulationBatchNorm2d", "PopulationBatchNorm3d"]

COLLECTED = ("collected_batches", "collected_count", "collected_mean", "collected_m2")


class _PopulationBatchNorm(BatchNormVariant):
    """What the three layers share; the arguments are explained at `PopulationBatchNorm1d`."""

    statistics_buffers = ("running_mean", "running_var", "collected_mean", "collected_m2")

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    collected_batches: Tensor
    collected_count: Tensor
    collected_mean: Tensor
    collected_m2: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 1.0,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        refresh_every: int = 100,
        nonfinite: str = "propagate",
    ) -> None:
        if isinstance(refresh_every, bool) or not isinstance(refresh_every, int) or refresh_every < 1:
            raise ValueError(f"refresh_every is {refresh_every!r}; it is a number of batches: 1, 2, ...")
        if momentum is None:
            raise ValueError("momentum is None; it is the weight of each refresh, from 0 to 1, where 1 replaces")
        if not track_running_stats:
            raise ValueError("track_running_stats=False: this layer has nothing else to normalize with")
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, nonfinite=nonfinite)
        self.refresh_every = refresh_every
        for name in ("collected_batches", "collected_count"):
            self.register_buffer(name, torch.zeros_like(self.num_batches_tracked))
        for name in ("collected_mean", "collected_m2"):
            self.register_buffer(name, torch.zeros_like(self.running_mean))

    def reset_running_stats(self) -> None:
        """Start over: running mean 0 and variance 1, nothing collected, the next batch is the first."""
        super().reset_running_stats()
        for name in COLLECTED:
            if name in self._buffers:  # torch's constructor calls this before they exist
                getattr(self, name).zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the input, channels in dimension 1, with the running statistics; in training, collect its own."""
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        _, update = self.switches(self.running_mean)
        batch = self._statistics_of(x) if update and x.numel() > 0 else None
        if batch is not None:
            self._start(batch)
        if self.statistics == "batch":
            y = functional.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)
        else:
            mean, var = self.running_mean, self.running_var
            y = functional.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        if batch is not None:
            self._collect(batch)
        return y

    @torch.no_grad()
    def _statistics_of(self, x: Tensor) -> Moments:
        """The batch's moments, or those of no samples if they are not finite and to be skipped."""
        if samples_per_channel(x) == 1 and (self.statistics == "batch" or self._is_first()):
            check_sample_count(x, None, None)
        batch = Moments(*(value.to(self.running_mean.dtype) for value in moments(x.detach())))
        if self.nonfinite == "propagate":
            return batch
        finite = batch.mean.isfinite() & batch.m2.isfinite()
        if self.nonfinite == "raise":
            check_finite(finite)
        # One channel cannot be left out alone: all of them share the count of what is collected.
        return Moments(*(torch.where(finite.all(), value, 0) for value in batch))

    def _is_first(self) -> bool:
        # Read on the host for batches with a single value alone; compiled code starts from mean 0 and variance 1.
        return not torch.compiler.is_compiling() and int(self.num_batches_tracked) == 0

    @torch.no_grad()
    def _start(self, batch: Moments) -> None:
        """Before there are any statistics, take those of the first batch."""
        first = (self.num_batches_tracked == 0) & (batch.count > 1)
        self.running_mean.copy_(torch.where(first, batch.mean, self.running_mean))
        self.running_var.copy_(torch.where(first, unbiased_variance(batch), self.running_var))

    @torch.no_grad()
    def _collect(self, batch: Moments) -> None:
        """Add a batch to the collection; if it completes it, refresh the running statistics and start a new one."""
        before = Moments(self.collected_count.to(batch.mean.dtype), self.collected_mean, self.collected_m2)
        merged = merge_moments(before, batch)
        counts = batch.count > 0
        self.num_batches_tracked.add_(counts)
        self.collected_batches.add_(counts)
        self.collected_count.add_(batch.count.to(self.collected_count.dtype))
        due = (self.collected_batches >= self.refresh_every) & (self.collected_count > 1)
        weight = 1.0 if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, merged.mean), (self.running_var, unbiased_variance(merged))):
            running.copy_(torch.where(due, running.lerp(new, weight), running))
        for collected, kept in ((self.collected_mean, merged.mean), (self.collected_m2, merged.m2)):
            collected.copy_(torch.where(due, 0, kept))
        self.collected_batches.mul_(~due)
        self.collected_count.mul_(~due)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(prefix + name in state_dict for name in COLLECTED):
            # A checkpoint of torch's layer: its statistics stay until the first collection is complete.
            nothing = {prefix + name: torch.zeros_like(getattr(self, name)) for name in COLLECTED}
            state_dict = {**state_dict, **nothing}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Torch's line and how often the statistics are refreshed."""
        return f"{super().extra_repr()}, refresh_every={self.refresh_every}"


class PopulationBatchNorm1d(_PopulationBatchNorm, nn.BatchNorm1d):
    """Batch normalization over (N, C) or (N, C, L) by the statistics of earlier batches, in training too.

    training and evaluation:  y = weight · (x - running_mean) / √(running_var + eps) + bias
    every `refresh_every` training batches:  running ← (μ, n/(n-1) σ²) of all their samples together

    What is left of batch normalization when the minibatch is taken out: outputs do not depend on the other samples of
    the batch, no gradient goes through the statistics, and training computes what evaluation computes. A batch of one
    trains. The layer in front can undo the normalization between refreshes, and activations can run away there.

    The first batch is normalized by its own statistics, taken as constants, and so are those that follow, until the
    first collection is complete. With `momentum` below 1 a refresh moves the running statistics instead of replacing
    them. Statistics of batches are merged with the variance between them. `num_batches_tracked` counts training
    batches; a counter of 0 is what makes a batch the first.

    State-dict keys are torch's and four more, `collected_...`, so that training resumes bit for bit in the middle of a
    collection. Checkpoints of torch's layer load strictly, with nothing collected. For torch's layer leave out the
    keys that contain "collected_". `statistics = "batch"` makes it plain batch normalization that goes on collecting;
    with `update_statistics = False` it collects nothing.

    Shapes:
        input, output: (N, C) or (N, C, L), any floating dtype.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of each refresh in the running statistics; 1 replaces them.
        affine: learn weight (starts at 1) and bias (starts at 0).
        track_running_stats: there for torch's order of arguments; must be True.
        device: of parameters and buffers.
        dtype: of parameters; statistics are never narrower than float32.
        refresh_every: training batches from one refresh to the next; 1: each is normalized by the one before.
        nonfinite: what an inf or NaN in a batch does to the running statistics: "propagate", "skip" the batch (all of
            its channels, other than in `BatchNorm1d`), or "raise".

    Raises:
        ValueError: an unknown option; in forward, a shape that does not fit, or a first batch with one value per
            channel.

    Source: Ioffe & Szegedy 2015, section 2, which gives the reason against it, and Algorithm 2, for the statistics.

    >>> import torch
    >>> layer = PopulationBatchNorm1d(1, eps=0.0, refresh_every=2)
    >>> layer(torch.tensor([[1.0], [3.0]])).flatten()          # by its own: mean 2, variance 2
    tensor([-0.7071,  0.7071], grad_fn=...)
    >>> layer(torch.tensor([[6.0]])).item()                    # by the same; then refreshed from 1, 3, 6
    2.828...
    >>> layer.running_mean.item(), layer.running_var.item()
    (3.333..., 6.333...)
    """


class PopulationBatchNorm2d(_PopulationBatchNorm, nn.BatchNorm2d):
    """Population batch normalization over (N, C, H, W); see `PopulationBatchNorm1d` for everything else.

    >>> import torch
    >>> PopulationBatchNorm2d(3)(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 3, 5, 5])
    """


class PopulationBatchNorm3d(_PopulationBatchNorm, nn.BatchNorm3d):
    """Population batch normalization over (N, C, D, H, W); see `PopulationBatchNorm1d` for everything else.

    >>> import torch
    >>> PopulationBatchNorm3d(3)(torch.randn(2, 3, 2, 5, 5)).shape
    torch.Size([2, 3, 2, 5, 5])
    """
