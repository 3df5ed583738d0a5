"""Whitening layers: batch normalization that also removes correlations (Decorrelated BN, IterNorm)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from batchlab import functional
from batchlab.functional.running_statistics import check_momentum
from batchlab.functional.whitening_arguments import check_group_size, check_whitening
from batchlab.nn.running_statistics import RunningStatistics
from batchlab.reference.batch_norm import statistics_dtype

__all__ = ["Whitening1d", "Whitening2d", "Whitening3d"]


class _Whitening(RunningStatistics):
    """What the three layers share; the arguments are explained at `Whitening1d`."""

    dimensions: ClassVar[tuple[int, ...]]
    statistics_buffers = ("running_mean", "running_covariance")

    running_mean: Tensor | None
    running_covariance: Tensor | None
    num_batches_tracked: Tensor | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None

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
        method: str = "zca",
        group_size: int | None = None,
        iterations: int = 5,
        coloring: bool = False,
    ) -> None:
        check_momentum(momentum)
        check_whitening(eps, method, iterations)
        size = check_group_size(num_features, group_size)
        if coloring and not affine:
            raise ValueError(
                "coloring=True learns a matrix and affine=False learns nothing: leave affine=True, or coloring"
            )
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.method = method
        self.group_size = size
        self.iterations = iterations
        self.coloring = coloring
        matrices = (num_features // size, size, size)
        parameter_dtype = torch.get_default_dtype() if dtype is None else dtype
        for name, shape in (("weight", matrices if coloring else (num_features,)), ("bias", (num_features,))):
            value = torch.empty(shape, device=device, dtype=parameter_dtype) if affine else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        if track_running_stats:
            wide = statistics_dtype(parameter_dtype)
            self.register_buffer("running_mean", torch.empty(num_features, device=device, dtype=wide))
            self.register_buffer("running_covariance", torch.empty(matrices, device=device, dtype=torch.float64))
            self.register_buffer("num_batches_tracked", torch.empty((), device=device, dtype=torch.long))
        else:
            for name in (*self.statistics_buffers, "num_batches_tracked"):
                self.register_buffer(name, None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Put the running mean to 0, the running covariance to the identity and the counter to 0."""
        if self.running_mean is None or self.running_covariance is None or self.num_batches_tracked is None:
            return
        self.running_mean.zero_()
        self.running_covariance.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Put the statistics and the parameters to where training starts: scale 1 or the identity, shift 0."""
        self.reset_running_stats()
        if self.weight is None or self.bias is None:
            return
        with torch.no_grad():
            if self.coloring:
                self.weight.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)
            else:
                self.weight.fill_(1)
            self.bias.zero_()

    def statistics_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What a buffer has where parameters have `dtype`: the covariance float64, the mean float32 or wider."""
        return torch.float64 if name == "running_covariance" else statistics_dtype(dtype)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim not in self.dimensions:
            allowed = " or ".join(f"{n}D" for n in self.dimensions)
            raise ValueError(f"expected {allowed} input (got {x.ndim}D input)")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"input has {x.shape[1]} channels in dimension 1, and this layer has num_features={self.num_features}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Whiten, then scale or color, and shift."""
        self._check_input(x)
        mean, sigma = self.running_mean, self.running_covariance
        use_batch, update = self.switches(mean)
        keep_out = use_batch and not update
        y = functional.whiten(
            x,
            None if keep_out else mean,
            None if keep_out else sigma,
            self.weight,
            self.bias,
            use_batch,
            self.momentum,
            self.eps,
            method=self.method,
            group_size=self.group_size,
            iterations=self.iterations,
            num_batches_tracked=self.num_batches_tracked if update else None,
        )
        if update and not use_batch and mean is not None and sigma is not None:
            functional.update_whitening_statistics(
                x,
                mean,
                sigma,
                self.momentum,
                group_size=self.group_size,
                num_batches_tracked=self.num_batches_tracked,
            )
        return y

    def extra_repr(self) -> str:
        """The settings of batch normalization, then every option that is not at its default."""
        words = [
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, method={self.method!r}"
        ]
        if self.method == "newton":
            words.append(f"iterations={self.iterations}")
        options = {
            "group_size": (self.group_size, self.num_features),
            "coloring": (self.coloring, False),
        }
        words += [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([*words, *self.changed_switches()])


class Whitening1d(_Whitening):
    """Whitening over (N, C) or (N, C, L): centered, and uncorrelated with variance 1 within each group of channels.

    training:    y = weight · W (x - μ) + bias,  W Σ Wᵀ = I,  μ and Σ = 1/n Σ (x - μ)(x - μ)ᵀ of the batch
                 running ← (1 - momentum) · running + momentum · (μ, n/(n-1) Σ)
    evaluation:  the same with the running statistics; W is computed from the running covariance at each call

    `method` says which W, for Σ with `eps` added to its diagonal:

    * "zca": (Σ + eps I)^(-1/2), symmetric: of all whitenings the one that changes the input least.
    * "cholesky": L⁻¹ with L Lᵀ = Σ + eps I, lower triangular: each channel is freed of those before it. The cheapest.
    * "newton": "zca" approached in `iterations` steps, without a decomposition. Directions with a small share of the
      group's variance come out smaller than 1, which keeps noise from being blown up where samples are few.

    With `group_size=1` it is batch normalization. The papers average W over batches; the running covariance is averaged
    here, as batch normalization averages variances and not their roots. Where a batch has fewer samples than channels,
    its W multiplies the directions without variance by 1/√eps, and so would an average of such W; the average of the
    covariances has full rank after a few batches. The two switches `statistics` and `update_statistics` are those of
    `BatchNorm1d`. An empty batch passes through and counts nothing.

    Shapes:
        input, output: (N, C) or (N, C, L), any floating dtype.
        weight: (C,), or with `coloring` (C/group_size, group_size, group_size); bias: (C,).
        running_mean: (C,); running_covariance: (C/group_size, group_size, group_size), float64 in any case.

    Args:
        num_features: C.
        eps: added to the diagonal of the covariance; above 0.
        momentum: weight of the new batch in the running statistics; None: the plain average over all batches.
        affine: learn weight (starts at 1) and bias (starts at 0).
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of parameters; statistics are never narrower than float32.
        method: "zca", "cholesky" or "newton".
        group_size: channels whitened together, neighbours; must divide C; None: all. The cost of a decomposition grows
            with its cube, and batches should have several times as many samples.
        iterations: of "newton".
        coloring: learn a matrix for each group (starts at the identity) instead of a weight for each channel.

    Raises:
        ValueError: an unknown option; in forward, a shape that does not fit or a batch with one value per channel.

    Source: Huang et al. 2018 (Decorrelated BN), Algorithms 1 and 2; Huang et al. 2019 (IterNorm), Algorithm 1.

    >>> import torch
    >>> layer = Whitening1d(6, group_size=3)
    >>> x = torch.randn(100, 6) @ torch.randn(6, 6)
    >>> torch.cov(layer(x).T, correction=0)[:3, :3].round(decimals=2).abs()
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]], grad_fn=<AbsBackward0>)
    >>> layer
    Whitening1d(6, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, method='zca', group_size=3)
    """

    dimensions = (2, 3)


class Whitening2d(_Whitening):
    """Whitening over (N, C, H, W), every position a sample; see `Whitening1d` for everything else.

    >>> import torch
    >>> Whitening2d(8, group_size=4, method="newton")(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    dimensions = (4,)


class Whitening3d(_Whitening):
    """Whitening over (N, C, D, H, W), every position a sample; see `Whitening1d` for everything else.

    >>> import torch
    >>> Whitening3d(4, method="cholesky")(torch.randn(2, 4, 3, 5, 5)).shape
    torch.Size([2, 4, 3, 5, 5])
    """

    dimensions = (5,)
