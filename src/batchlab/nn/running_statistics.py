"""Running statistics as layers hold them: two switches (which are used, whether they move), float32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor, nn

from batchlab.reference.batch_norm import statistics_dtype

__all__ = ["RunningStatistics"]

STATISTICS: Final = ("auto", "batch", "running")


class RunningStatistics(nn.Module):
    """What layers with running statistics share, in front of torch's class or alone.

    `statistics` says which statistics normalize, `update_statistics` whether training moves the running ones; `train()`
    and `eval()` touch neither. The buffers named in `statistics_buffers` are never narrower than `statistics_dtype`.
    """

    statistics_buffers: ClassVar[tuple[str, ...]] = ("running_mean", "running_var")
    # Class-level defaults let layers load that were pickled before an option existed.
    update_statistics: bool = True
    _statistics: str = "auto"

    @property
    def statistics(self) -> str:
        """Which statistics normalize: "batch", "running", or "auto": batch in training, running in evaluation."""
        return self._statistics

    @statistics.setter
    def statistics(self, value: str) -> None:
        if value not in STATISTICS:
            raise ValueError(f"statistics is {value!r}; allowed are {', '.join(map(repr, STATISTICS))}")
        if value == "running" and getattr(self, self.statistics_buffers[0]) is None:
            raise ValueError(
                "statistics='running' needs running statistics, and this layer has track_running_stats=False"
            )
        self._statistics = value

    def switches(self, running: Tensor | None) -> tuple[bool, bool]:
        """Whether the batch's statistics normalize, and whether `running`, one of the running ones, is to move."""
        use_batch = self._statistics == "batch" or running is None or (self._statistics == "auto" and self.training)
        update = running is not None and self.training and bool(self.track_running_stats) and self.update_statistics
        return use_batch, update

    def changed_switches(self) -> list[str]:
        """The switches that are not at their default, for `extra_repr`."""
        switches = {"statistics": (self.statistics, "auto"), "update_statistics": (self.update_statistics, True)}
        return [f"{name}={value!r}" for name, (value, default) in switches.items() if value != default]

    def statistics_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:  # noqa: ARG002 - subclasses look at it
        """What a buffer of statistics has where parameters have `dtype`: float32 or wider."""
        return statistics_dtype(dtype)

    def widen_statistics(self) -> None:
        """Keep the running statistics float32 or wider; in half precision small updates would be rounded away."""
        for name in self.statistics_buffers:
            buffer = getattr(self, name, None)  # a subclass may not have registered its own yet
            if buffer is not None and buffer.is_floating_point():
                setattr(self, name, buffer.to(self.statistics_dtype(name, buffer.dtype)))

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        # .half() and .bfloat16() cast every buffer. Widening afterwards would bring back rounded values, so the
        # originals are kept and only moved to where the cast ones went.
        before = [getattr(self, name) for name in self.statistics_buffers]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in zip(self.statistics_buffers, before, strict=True):
            if old is None:
                continue
            new = getattr(self, name)
            wide = self.statistics_dtype(name, new.dtype)
            if new.dtype != wide:
                setattr(self, name, old.to(device=new.device, dtype=torch.promote_types(old.dtype, wide)))
        return self
