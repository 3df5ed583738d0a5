"""What the layers with factored weights share (Salimans & Kingma 2016, and three relatives)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor, nn

from batchlab import functional
from batchlab.functional.factored import Factors, check_factorization, factor_weight
from batchlab.nn.factored_keys import with_own_keys
from batchlab.nn.factored_start import normalizing_gain
from batchlab.reference import factored as reference
from batchlab.reference.batch_norm import statistics_dtype

__all__ = ["FactoredLayer"]

OF_EVERY_MODULE: Final = frozenset(vars(nn.Module()))
VECTORS: Final = ("left", "right")
FIRST_STEPS: Final = 15  # of the power iteration of a new layer, as in torch


class FactoredLayer(nn.Module):
    """State and methods of the four layers, beside a torch layer's own; described at `FactoredLinear`."""

    stock: ClassVar[type[nn.Module]]
    unit_dim: ClassVar[int]  # of the output, from the end
    factorization: str
    eps: float
    v: nn.Parameter
    g: nn.Parameter
    bias: Any  # a Parameter or None; torch's classes declare it differently
    left: Tensor | None
    right: Tensor | None

    def _take(self, layer: nn.Module, factors: Factors, factorization: str, eps: float) -> None:
        """Become what `layer` is, with factors in the place of its weight; parameters stay the same objects."""
        nn.Module.__init__(self)
        vars(self).update({key: value for key, value in vars(layer).items() if key not in OF_EVERY_MODULE})
        self.factorization, self.eps = factorization, eps
        v: Any = layer._parameters["weight"]
        self.g = nn.Parameter(factors.g, requires_grad=v.requires_grad)
        self.v = v
        self.register_parameter("bias", layer._parameters["bias"])
        self.register_buffer("left", factors.left)
        self.register_buffer("right", factors.right)
        self.training = layer.training

    def _start(self, layer: nn.Module, factorization: str, eps: float) -> None:
        check_factorization(factorization, eps)
        weight: Any = layer.weight
        _check_fan_in(weight, factorization)
        self._take(layer, self._first_factors(weight.detach(), factorization, eps), factorization, eps)

    @staticmethod
    def _first_factors(v: Tensor, factorization: str, eps: float) -> Factors:
        """Factors of a random weight: as `factor_weight`, but means are dropped and σ is estimated, in little time."""
        if factorization != "spectral_norm":
            return factor_weight(v, factorization, eps, project=True)
        wide = v.to(statistics_dtype(v.dtype)).flatten(1)
        vectors = (torch.randn_like(wide[:, :1].flatten()), torch.randn_like(wide[:1].flatten()))
        left, right = (x / torch.linalg.vector_norm(x).clamp(min=eps) for x in vectors)
        left, right = reference.power_iteration(v, left, right, eps, FIRST_STEPS)
        return Factors(v, reference.length(v, factorization, eps, left, right).to(v.dtype), left, right)

    @classmethod
    def from_module(
        cls, module: nn.Module, factorization: str = "weight_norm", eps: float = 1e-5, *, project: bool = False
    ) -> Self:
        """Return a factored layer with the function of a stock one: v is its weight, g the length of v.

        The weight (as v) and the bias are the same Parameter objects; device, dtype, mode and requires_grad are kept.
        `module` keeps its own hooks; `batchlab.surgery.to_factored` converts a model with everything that is on it.

        Args:
            module: a torch layer of the class that this one stands for.
            factorization: see the class.
            eps: see the class.
            project: accept that a centred factorization drops the mean of each unit's weight.

        Raises:
            TypeError: another class (subclasses too: they may do something else).
            ValueError: the weight has a mean that would be lost, or values that are not finite; the message says more.

        >>> from batchlab.nn import FactoredLinear
        >>> linear = torch.nn.Linear(4, 3)
        >>> layer = FactoredLinear.from_module(linear)
        >>> torch.equal(layer.weight, linear.weight), layer.v is linear.weight
        (True, True)
        """
        if type(module) is not cls.stock:
            raise TypeError(
                f"{cls.__name__}.from_module needs a torch.nn.{cls.stock.__name__}, got {type(module).__name__}"
            )
        if "forward" in vars(module):
            raise TypeError(f"the forward of this {type(module).__name__} is patched, and would be lost")
        weight: Any = module.weight
        check_factorization(factorization, eps)
        _check_fan_in(weight, factorization)
        factors = factor_weight(weight.detach(), factorization, eps, project=project)
        layer = cls.__new__(cls)
        layer._take(module, factors, factorization, eps)
        return layer

    def merged(self) -> nn.Module:
        """Return torch's own layer with the effective weight, a new Parameter; the bias is the same object.

        >>> from batchlab.nn import FactoredLinear
        >>> layer = FactoredLinear(4, 3)
        >>> layer.merged()
        Linear(in_features=4, out_features=3, bias=True)
        """
        layer = self.stock.__new__(self.stock)
        nn.Module.__init__(layer)
        left_out = OF_EVERY_MODULE | {"factorization", "eps"}
        vars(layer).update({key: value for key, value in vars(self).items() if key not in left_out})
        layer.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=self.v.requires_grad)
        layer.register_parameter("bias", self.bias)
        layer.training = self.training
        return layer

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "weight is computed from v and g and cannot be assigned: use layer.set_weight(weight), or change "
                "layer.v and layer.g"
            )
        super().__setattr__(name, value)

    def _effective_weight(self) -> Tensor:
        """The effective weight, computed anew at each access, with gradients to v and g; it cannot be written to."""
        # Copies, because the next training forward writes into the buffers.
        left, right = (None if x is None else x.clone() for x in (self.left, self.right))
        return functional.factored_weight(self.v, self.g, self.factorization, self.eps, left=left, right=right)

    weight: Tensor = property(_effective_weight)  # type: ignore[assignment]  # read-only, which torch's is not

    def _training_weight(self) -> Tensor:
        """The effective weight; spectral_norm first improves its singular vectors by one step."""
        left, right = self.left, self.right
        if left is None or right is None:
            return self.weight
        left, right = reference.power_iteration(self.v, left, right, self.eps)
        with torch.no_grad():
            self.left.copy_(left)  # type: ignore[union-attr]
            self.right.copy_(right)  # type: ignore[union-attr]
        return functional.factored_weight(self.v, self.g, self.factorization, self.eps, left=left, right=right)

    def _respond(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Apply the layer with its effective weight."""
        return self._respond(input, self._training_weight() if self.training else self.weight, self.bias)

    @torch.no_grad()
    def set_weight(self, weight: Tensor, *, project: bool = False) -> None:
        """Write a weight into the factors, in place: v ← weight, g ← the length of v.

        Args:
            weight: of v's shape; the effective weight afterwards.
            project: accept that a centred factorization drops the mean of each unit.

        Raises:
            ValueError: another shape, or a weight that the factorization does not have; nothing is changed.

        >>> from batchlab.nn import FactoredLinear
        >>> layer = FactoredLinear(4, 3)
        >>> layer.set_weight(torch.nn.init.orthogonal_(torch.empty(3, 4)))
        """
        if weight.shape != self.v.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; this layer's is {tuple(self.v.shape)}")
        factors = factor_weight(weight.to(self.v), self.factorization, self.eps, project=project)
        for name, value in factors._asdict().items():
            if value is not None:
                getattr(self, name).copy_(value)

    def reset_parameters(self) -> None:
        """Draw v and the bias as torch's layer draws weight and bias; the gain makes the weight what was drawn.

        (Without its mean, where the factorization drops that.)
        """
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.v, a=math.sqrt(5))
            if self.bias is not None:
                bound = 1 / math.sqrt(max(_fan_in(self.v), 1))
                nn.init.uniform_(self.bias, -bound, bound)
            factors = self._first_factors(self.v.detach(), self.factorization, self.eps)
            for name in ("g", *VECTORS):
                if getattr(self, name) is not None:
                    getattr(self, name).copy_(getattr(factors, name))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set gain and bias so that each unit's output over this batch has mean 0 and deviation 1.

        t = v · x / ‖v‖,  g ← 1/std(t),  b ← -mean(t)/std(t),  over samples and positions, std with 1/n

        (v / ‖v‖ is what the factorization has in its place.) Computed in float64. Without a bias the mean stays.
        `batchlab.surgery.initialize_from_data` does this for a whole model.

        Args:
            x: a batch as the layer gets it.

        Raises:
            ValueError: units that return the same for the whole batch, by number, or fewer than two values per unit;
                or spectral_norm, which has one gain for all units. Nothing is changed.

        Source: Salimans & Kingma 2016, section 3, equations 5 and 6.

        >>> from batchlab.nn import FactoredLinear
        >>> layer = FactoredLinear(4, 3)
        >>> x = 100 + torch.randn(50, 4)
        >>> layer.initialize(x)
        >>> torch.allclose(layer(x).std(0, correction=0), torch.ones(3), atol=1e-3)
        True
        """
        if self.factorization == "spectral_norm":
            raise ValueError("spectral_norm has one gain for all units: it cannot give each of them a deviation of 1")
        v = self.v.double()
        unit = functional.factored_weight(v, torch.ones_like(self.g, dtype=v.dtype), self.factorization, self.eps)
        t = self._respond(x.double(), unit, None)
        t = t.movedim(self.unit_dim, 0).reshape(len(self.v), -1).t()  # (values, units)
        sizes = unit.flatten(1).abs().sum(1).max() * x.abs().max() if t.numel() else torch.zeros(())
        gain, shift = normalizing_gain(t, float(sizes), x.dtype)
        new_g, new_bias = gain.view_as(self.g).to(self.g.dtype), shift.to(self.g.dtype)
        if not (new_g.isfinite().all() and new_bias.isfinite().all()):
            raise ValueError(f"a gain or bias is too large for {self.g.dtype}; nothing was changed")
        self.g.copy_(new_g)
        if self.bias is not None:
            self.bias.copy_(new_bias)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        # .half() casts every buffer; the vectors stay wide, and keep the values that a cast would round.
        before = {name: getattr(self, name) for name in VECTORS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != statistics_dtype(new.dtype):
                setattr(self, name, old.to(device=new.device, dtype=statistics_dtype(old.dtype)))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wrong = with_own_keys(state_dict, prefix, self.factorization, self.eps, self.g)
        if wrong is not None:
            error_msgs.append(wrong)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """Torch's line, then the factorization, then eps if it is not at its default."""
        words = [super().extra_repr(), f"factorization={self.factorization!r}"]
        return ", ".join(words if self.eps == 1e-5 else [*words, f"eps={self.eps}"])


def _fan_in(weight: Tensor) -> int:
    return math.prod(weight.shape[1:])


def _check_fan_in(weight: Tensor, factorization: str) -> None:
    if factorization in reference.CENTERED and _fan_in(weight) == 1:
        raise ValueError(
            f"{factorization} subtracts each unit's mean, and with one weight per unit (shape {tuple(weight.shape)}) "
            "nothing remains: use weight_norm"
        )
