"""Population statistics for inference, with frozen weights (Ioffe & Szegedy 2015, Algorithm 2, lines 7 to 10)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchlab.functional.gather import check_process_group
from batchlab.surgery.gathering import gather
from batchlab.surgery.layers import ChannelNorm, has_statistics, running_statistics
from batchlab.surgery.population import ESTIMATORS, Population, empty_population
from batchlab.surgery.ranks import agree, group_of, over_ranks
from batchlab.surgery.wrappers import check_model

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["recalibrate"]


def _is_frozen(layer: ChannelNorm) -> bool:
    return getattr(layer, "statistics", "auto") == "running" or not getattr(layer, "update_statistics", True)


def _to_recalibrate(model: nn.Module) -> dict[str, ChannelNorm]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ChannelNorm)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no batch normalization layer to recalibrate (torch.nn.BatchNorm1d to 3d, "
            "SyncBatchNorm, batchlab.nn's, also those of mean or variance alone, and what extends them)"
        )
    return {
        name: layer
        for name, layer in layers.items()
        if has_statistics(layer) and layer.track_running_stats and not _is_frozen(layer)
    }


def _check(batches: Iterable[Any], estimator: str, process_group: ProcessGroup | None) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; allowed are {', '.join(map(repr, ESTIMATORS))}")
    if isinstance(batches, (Tensor, dict, str)):
        raise TypeError(
            f"batches is one {type(batches).__name__}; give an iterable of batches, such as [x] or a loader"
        )
    if process_group is not None:
        check_process_group(process_group)


def _statistics(name: str, layer: ChannelNorm, population: Population, estimator: str) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a layer's buffer and its new value."""
    count = (population.within if estimator == "algorithm2" else population.samples).count
    if count < 2:
        raise ValueError(
            f"'{name}' saw {int(count)} samples per channel that make a variance, and needs 2; the model is as it was. "
            "Give more or larger batches"
        )
    new = (population.samples.mean, ESTIMATORS[estimator](population))
    pairs = [
        (buffer, value.to(buffer))
        for buffer, value in zip(running_statistics(layer), new, strict=True)
        if buffer is not None
    ]
    bad = ~torch.stack([value.isfinite() for _, value in pairs]).all(0)
    if bad.any():
        raise ValueError(
            f"'{name}' has non-finite statistics in {int(bad.sum())} of {bad.numel()} channels; the model is as it "
            "was. Look for inf or NaN in the batches, or an overflow in half precision"
        )
    return pairs


def _write(new: list[tuple[Tensor, Tensor]]) -> None:
    before = [(buffer, buffer.clone()) for buffer, _ in new]
    try:
        for buffer, value in new:
            buffer.copy_(value)
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: str = "pooled",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    process_group: ProcessGroup | None = None,
) -> nn.Module:
    """Replace the running averages of all batch normalizations by the statistics of `batches`, and return the model.

    "pooled":      running_mean = mean of all samples,  running_var = M2/(n - 1) of all samples
    "algorithm2":  running_mean = E_B[μ_B],             running_var = E_B[m/(m - 1) σ²_B],  weighted by batch size m

    Both means are the same number. "pooled" is what one big batch would give, however the samples are split;
    "algorithm2" is the paper's line 10 and leaves the variance between the batches out. They agree in expectation for
    shuffled batches (independent samples), and differ where batches differ: sorted or grouped data, one domain or one
    image per batch. There "pooled" describes the data, "algorithm2" what a normalization saw in training.

    Layers of mean or variance alone get theirs of the two.

    The weights are frozen. The normalizations use each batch's own statistics, as in training, and everything else is
    in evaluation mode: dropout is off. Nothing but the values of `running_mean` and `running_var` changes: not the
    weights, modes, gradients, hooks, random state or `num_batches_tracked`. If anything fails, Ctrl-C included, the
    model is bitwise as before.

    Left as they are: layers without running statistics, and batchlab's frozen ones (`statistics = "running"` or
    `update_statistics = False`), which run as in evaluation. Stock layers that are frozen by `.eval()` cannot be told
    from others and are recalibrated. A layer that is called several times per batch counts all its calls; `mask=` of
    batchlab's layers is honoured.

    Args:
        model: changed in place.
        batches: an iterable of tensors, of tuples or lists that start with the input, or of dicts of keyword
            arguments. 1,000 to 10,000 samples are usually enough.
        estimator: "pooled" or "algorithm2".
        forward: `forward(model, batch)`, for batches of another form.
        device: where to move the batches; None leaves them where they are.
        process_group: the statistics of all its ranks, weighted by count, equal on every rank; ranks may have uneven
            or no batches. Layers that normalize over ranks by themselves are merged over theirs without it.

    Raises:
        TypeError: a wrapped (DistributedDataParallel, torch.compile, ...) or scripted model, one tensor in place of an
            iterable, or a batch without a tensor in front.
        ValueError: a model without batch normalization, no batches, fewer than two samples per channel, a non-finite
            result, a lazy parameter, or an unknown estimator.
        RuntimeError: another rank failed.

    Source: Ioffe & Szegedy 2015, Algorithm 2, lines 7 to 10; Wu & Johnson 2021, section 3, for what it is good for.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1))
    >>> _ = recalibrate(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0], [6.0]])])
    >>> model[1].running_mean.item(), model[1].running_var.item()
    (6.0, 26.0)
    """
    check_model(model, "recalibrate")
    _check(batches, estimator, process_group)
    layers = _to_recalibrate(model)
    if not layers:
        warnings.warn("recalibrate changed nothing: every normalization is frozen or untracked", stacklevel=2)
        return model
    groups = {name: process_group or group_of(layer) for name, layer in layers.items()}
    together = next((group for group in groups.values() if group is not None), None)
    error: Exception | None = None
    populations: dict[ChannelNorm, Population] = {}
    count = 0
    try:
        populations, count = gather(model, list(layers.values()), batches, forward, device)
    except Exception as raised:
        if together is None:
            raise
        error = raised
    if together is not None:
        count = agree(error, count, together, empty_population(next(iter(layers.values()))).samples.mean.device)
    if error is not None:
        raise error
    if count == 0:
        raise ValueError("batches has no batch (a generator that was used before?); the model is as it was")
    merged = {
        name: over_ranks(populations.get(layer) or empty_population(layer), groups[name])
        for name, layer in layers.items()
    }
    reached = {name: population for name, population in merged.items() if population.samples.count > 0}
    _write(
        [
            pair
            for name, population in reached.items()
            for pair in _statistics(name, layers[name], population, estimator)
        ]
    )
    if len(reached) < len(layers):
        unreached = ", ".join(repr(name) for name in layers if name not in reached)
        warnings.warn(f"no batch reached {unreached}: left with the statistics of before", stacklevel=2)
    return model
