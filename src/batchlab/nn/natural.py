"""A linear layer in the coordinates of its whitened input (Desjardins et al. 2015, PRONG)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.functional.autocast import full_precision
from batchlab.nn.natural_coordinates import (
    COLLECTED,
    COORDINATES,
    check_natural,
    first_buffers,
    new_coordinates,
    reprojected,
)
from batchlab.reference import natural as reference
from batchlab.reference.batch_norm import statistics_dtype

__all__ = ["NaturalLinear"]

OPTIONS: Final = ("eps", "momentum", "update_statistics")
OF_EVERY_MODULE: Final = frozenset(vars(nn.Module()))


class NaturalLinear(nn.Linear):
    """A linear layer whose parameters are seen from its whitened input, so that one step size suits all directions.

    y = V U (x - c) + d,   W = V U,   b = d - W c
    refresh:   U ← (Σ + eps I)^(-1/2),  c ← E[x],   V ← W U⁻¹,  d ← b + W c   (W and b stay what they are)

    V and d (`v` and `d`) are trained; U and c (`whitening` and `center`) are buffers without gradient. A new layer has
    U = I and c = 0: it is torch's `Linear`, with the same random start. In training the layer collects count, mean and
    co-moments of its inputs; `refresh()` makes U and c of them. A step of gradient descent on (V, d) then moves W by
    -lr · Ĝ (Σ + eps I)⁻¹, where Ĝ is the gradient with centred inputs. Nothing is refreshed by itself, because an
    optimizer's momentum is in the coordinates of V and d as well: `batchlab.optim.NaturalRefresh` does both, after the
    optimizer's step.

    * Without a bias, c stays 0, and Σ is E[x xᵀ]: W alone cannot make up for a shift.
    * `weight` and `bias` are W and b, read-only, with gradients to V and d. Initializers of torch.nn.init are for `v`
      and `d` of a new layer; `from_module` and `merged` go from a stock layer and back.
    * A batch with an inf or NaN is not collected. `update_statistics = False` stops collecting; the collection costs
      a product of (in, N) and (N, in) in float64, and U one of (N, in) and (in, in).
    * Where the rounding of the dtype is larger, it is added to Σ in the place of eps: 1.2e-7 of Σ's trace in float32.
      U and c are float32 or wider, what is collected is float64, also under `.half()`.
    * Checkpoints of `torch.nn.Linear` load strictly, into U = I and c = 0; `layer.merged().state_dict()` is one.

    Evaluation computes the same and collects nothing; for inference alone, `merged()` is the layer at the cost of one.

    Shapes:
        input: (..., in_features); output: (..., out_features).
        v: (out_features, in_features); d: (out_features,).
        whitening: (in_features, in_features); center: (in_features,).

    Args:
        in_features: size of each input.
        out_features: number of units.
        bias: learn d.
        device: of parameters and buffers.
        dtype: of parameters.
        eps: added to the diagonal of the covariance; above 0, in the units of the input's variance. Directions with
            less variance are learned as slowly as with Σ = eps.
        momentum: weight of the new collection at a refresh, above 0 to 1; what was collected before counts 1 - momentum
            as much as it did. None: everything counts the same, the plain average over all batches.

    Raises:
        ValueError: an option out of its range, or no input; in forward, an input of another width.

    Source: Desjardins, Simonyan, Pascanu & Kavukcuoglu 2015, section 3 and Algorithm 1.

    >>> import torch
    >>> layer = NaturalLinear(2, 1)
    >>> x = torch.tensor([[9.0, 4.0], [11.0, 4.0], [9.0, 6.0], [11.0, 6.0]]) * torch.tensor([10.0, 1.0])
    >>> before = layer(x)
    >>> layer.refresh()
    True
    >>> layer.center, layer.whitening.round(decimals=3)
    (tensor([100.,   5.]), tensor([[0.1000, 0.0000],
            [0.0000, 1.0000]]))
    >>> torch.allclose(layer(x), before, atol=1e-4)
    True
    """

    v: nn.Parameter
    d: Any  # a Parameter or None
    whitening: Tensor
    center: Tensor
    collected_count: Tensor
    collected_mean: Tensor
    collected_m2: Tensor
    eps: float
    momentum: float | None
    update_statistics: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-3,
        momentum: float | None = 1.0,
    ) -> None:
        check_natural(eps, momentum)
        if in_features < 1:
            raise ValueError(f"in_features is {in_features}; there must be at least one input to whiten")
        self._take(nn.Linear(in_features, out_features, bias, device, dtype), eps, momentum)

    def _take(self, layer: nn.Linear, eps: float, momentum: float | None) -> None:
        """Become what `layer` is; its parameters stay the same objects."""
        nn.Module.__init__(self)
        vars(self).update({key: value for key, value in vars(layer).items() if key not in OF_EVERY_MODULE})
        for name, own in (("v", "weight"), ("d", "bias")):
            self.register_parameter(name, layer._parameters[own])
        self._start(eps, momentum)
        self.training = layer.training

    def _start(self, eps: float, momentum: float | None) -> None:
        """Get the options and the buffers, beside v and d."""
        self.eps, self.momentum, self.update_statistics = eps, momentum, True
        for name, value in first_buffers(self.v).items():
            self.register_buffer(name, value)

    @classmethod
    def from_module(cls, module: nn.Linear, eps: float = 1e-3, momentum: float | None = 1.0) -> Self:
        """Return a natural layer with the function of a stock one: v and d are its weight and bias, the same objects.

        `module` keeps its own hooks; `batchlab.surgery.to_natural` converts a model with everything that is on it.

        Args:
            module: a torch.nn.Linear.
            eps: see the class.
            momentum: see the class.

        Raises:
            TypeError: another class (subclasses too: they may do something else).
            ValueError: an option out of its range.

        >>> linear = torch.nn.Linear(4, 3)
        >>> NaturalLinear.from_module(linear).v is linear.weight
        True
        """
        if type(module) is not nn.Linear:
            raise TypeError(f"{cls.__name__}.from_module needs a torch.nn.Linear, got {type(module).__name__}")
        if "forward" in vars(module):
            raise TypeError("the forward of this Linear is patched, and would be lost")
        check_natural(eps, momentum)
        layer = cls.__new__(cls)
        layer._take(module, eps, momentum)
        return layer

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return torch's own layer with W and b, which are new Parameters; multiplied out in float64.

        >>> NaturalLinear(4, 3).merged()
        Linear(in_features=4, out_features=3, bias=True)
        """
        d = None if self.d is None else self.d.double()
        weight, bias = reference.effective(self.v.double(), d, self.whitening.double(), self.center.double())
        layer = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(layer)
        left_out = OF_EVERY_MODULE.union(OPTIONS)
        vars(layer).update({key: value for key, value in vars(self).items() if key not in left_out})
        for name, new, old in (("weight", weight, self.v), ("bias", bias, self.d)):
            parameter = None if new is None else nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad)
            layer.register_parameter(name, parameter)
        layer.training = self.training
        return layer

    def _effective(self) -> tuple[Tensor, Tensor | None]:
        # Copies, because a refresh writes into the buffers.
        wide = self.whitening.dtype
        d = None if self.d is None else self.d.to(wide)
        with full_precision(self.v):
            return reference.effective(self.v.to(wide), d, self.whitening.clone(), self.center.clone())

    def _effective_weight(self) -> Tensor:
        """The weight W = V U, computed anew at each access, with a gradient to v; it cannot be written to."""
        return self._effective()[0].to(self.v.dtype)

    def _effective_bias(self) -> Tensor | None:
        """The bias b = d - W c, computed anew at each access, with gradients to d and v; it cannot be written to."""
        bias = self._effective()[1]
        return None if bias is None else bias.to(self.v.dtype)

    weight: Tensor = property(_effective_weight)  # type: ignore[assignment]  # read-only, which torch's are not
    bias: Any = property(_effective_bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"{name} is computed from v, d, whitening and center and cannot be assigned: change a stock layer, "
                "layer.merged(), and take NaturalLinear.from_module of it"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Draw v and d as torch draws weight and bias, and start over: U = I, c = 0, nothing collected."""
        fresh = nn.Linear(self.in_features, self.out_features, self.d is not None, self.v.device, self.v.dtype)
        with torch.no_grad():
            self.v.copy_(fresh.weight)
            if self.d is not None:
                self.d.copy_(fresh.bias)
            for name, value in first_buffers(self.v).items():
                getattr(self, name).copy_(value)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Apply the layer; in training, collect the moments of the input."""
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"input has shape {tuple(input.shape)}; its last dimension must be in_features={self.in_features}"
            )
        # Whitened first: the result has size one in every direction, which any dtype holds, unlike V U or x.
        with full_precision(input):
            whitened = F.linear(input.to(self.whitening.dtype) - self.center, self.whitening)
        y = F.linear(whitened.to(input.dtype), self.v, self.d)
        if self.training and self.update_statistics and input.numel() > 0:
            self._collect(input.detach())
        return y

    @torch.no_grad()
    def _collect(self, x: Tensor) -> None:
        with full_precision(x):
            batch = reference.comoments(x.reshape(-1, x.shape[-1]))
            finite = batch.m2.isfinite().all() & batch.mean.isfinite().all()
            batch = reference.CoMoments(*(torch.where(finite, value, 0) for value in batch))
            merged = reference.merge_comoments(self._collection(), batch)
        for name, value in zip(COLLECTED, merged, strict=True):
            getattr(self, name).copy_(value)

    def _collection(self) -> reference.CoMoments:
        return reference.CoMoments(self.collected_count.squeeze(0), self.collected_mean, self.collected_m2)

    @torch.no_grad()
    def refresh(self, also: Iterable[tuple[Tensor | None, Tensor | None]] = ()) -> bool:
        """Take U and c from what was collected, and put V and d to where W and b are what they were.

        Call it between an optimizer's step and the next forward pass. Gradients of v and d are dropped, since they
        belong to the old coordinates. Fewer than two samples change nothing.

        Args:
            also: pairs like (v, d), changed in place as v and d are; for velocities, such as momentum, so that they
                move W and b as before. None stands for zeros.

        Returns:
            whether anything was changed.

        Raises:
            ValueError: a new v, d or velocity is too large for its dtype, or a shape does not fit; nothing is changed.

        >>> layer = NaturalLinear(4, 3)
        >>> layer.refresh()                         # nothing collected
        False
        """
        group = self._collection()
        if not float(group.count) > 1:
            return False
        old = (self.whitening, self.center)
        new = new_coordinates(group, self.d is not None, self.eps, self.whitening)
        for value, projected in [*reprojected((self.v, self.d), also, old, new), *zip(old, new, strict=True)]:
            value.copy_(projected)
        for parameter in (self.v, self.d):
            if parameter is not None:
                parameter.grad = None
        self._forget()
        return True

    def _forget(self) -> None:
        """Let what was collected count less, or nothing, from now on."""
        if self.momentum is None:
            return
        kept = 1 - self.momentum
        self.collected_count.mul_(kept)
        self.collected_m2.mul_(kept)
        if kept == 0:
            self.collected_mean.zero_()

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        # .half() casts every buffer; these stay wide, and keep the values that a cast would round.
        before = {name: getattr(self, name) for name in (*COORDINATES, *COLLECTED)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            wide = torch.float64 if name in COLLECTED else statistics_dtype(new.dtype)
            if new.dtype != wide:
                setattr(self, name, old.to(device=new.device, dtype=torch.promote_types(old.dtype, wide)))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict and prefix + "v" not in state_dict:
            state_dict[prefix + "v"] = state_dict.pop(prefix + "weight")
            if prefix + "bias" in state_dict:
                state_dict[prefix + "d"] = state_dict.pop(prefix + "bias")
            state_dict.update({prefix + name: value for name, value in first_buffers(self.v).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Torch's line, then every option that is not at its default."""
        options = {"eps": (self.eps, 1e-3), "momentum": (self.momentum, 1.0)}
        options["update_statistics"] = (self.update_statistics, True)
        changed = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.d is not None}"
        return ", ".join([sizes, *changed])
