"""Refreshing the coordinates of natural layers during training, with the optimizer's momentum (PRONG)."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import torch
from torch import Tensor, nn

from batchlab.nn.natural import NaturalLinear
from batchlab.optim.submatrix_sgd import SubmatrixSGD

__all__ = ["NaturalRefresh"]

MOMENTUM: Final = ("transport", "reset")
NEEDS_ITS_STATE: Final = (torch.optim.Adagrad, torch.optim.LBFGS)  # the others start a state where there is none


class NaturalRefresh:
    """Refresh all natural layers of a model after every so many steps of its optimizer.

    W = V U,  b = d - W c  stay what they are at a refresh. A step of SGD moves (V, d) along its momentum (m, n), and
    so W and b along m U and n - m U c. What happens to it is `momentum`:

    "transport":  m ← m U U'⁻¹,  n ← n + m U (c' - c): the momentum of W and b stays what it is. For SGD.
    "reset":      the optimizer's state of V and d is forgotten, as at the start of training. For any optimizer.

    Without either, momentum of the old coordinates would push V in directions that have nothing to do with it. Second
    moments (Adam, RMSprop) belong to single entries of V and cannot be transported. Call `step` after the optimizer's,
    and `refresh` once before training, after some batches without gradients, to start in whitened coordinates.

    Args:
        model: with `batchlab.nn.NaturalLinear` layers; others are left alone.
        optimizer: of its parameters.
        every: number of steps between refreshes. In that time layers should see several times as many samples as they
            have inputs, or keep old ones by their own `momentum`.
        momentum: "transport" or "reset".

    Raises:
        ValueError: an option out of its range, a model without natural layers or with shared ones' parameters, or an
            optimizer that `momentum` does not fit.
        RuntimeError: in several processes, whose layers would each collect and refresh on their own.

    Source: Desjardins et al. 2015, Algorithm 1; that momentum must be looked after is not in it.

    >>> import torch
    >>> layer = NaturalLinear(3, 2)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    >>> refresh = NaturalRefresh(layer, optimizer, every=2)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     layer(torch.randn(20, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     refresh.step()
    False
    True
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int = 100, *, momentum: str = "transport"
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; it is a number of steps: 1, 2, ...")
        if momentum not in MOMENTUM:
            raise ValueError(f"momentum is {momentum!r}; allowed are {', '.join(map(repr, MOMENTUM))}")
        kind = type(optimizer).__name__
        if momentum == "transport" and not isinstance(optimizer, (torch.optim.SGD, SubmatrixSGD)):
            raise ValueError(
                f"momentum='transport' is for SGD, whose momentum is a velocity of the parameters; with {kind} use "
                "momentum='reset'"
            )
        if isinstance(optimizer, NEEDS_ITS_STATE):
            raise ValueError(f"{kind} cannot start anew for single parameters; use SGD or Adam")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
            if ranks > 1:
                raise RuntimeError(
                    f"there are {ranks} processes, and each would whiten by its own samples and leave the others: "
                    "natural layers train in one process"
                )
        self.model = model
        self.optimizer = optimizer
        self.every = every
        self.momentum = momentum
        self.steps = 0
        self._layers()

    def _layers(self) -> dict[str, NaturalLinear]:
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, NaturalLinear)}
        if not layers:
            raise ValueError(
                f"{type(self.model).__name__} has no natural layer to refresh: batchlab.surgery.to_natural makes them"
            )
        uses = Counter(id(p) for module in self.model.modules() for p in module._parameters.values() if p is not None)
        for name, layer in layers.items():
            if max(uses[id(p)] for p in layer.parameters(recurse=False)) > 1:
                raise ValueError(f"'{name}' shares v or d with another module, which a refresh would change")
        return layers

    def step(self) -> bool:
        """Count one step of the optimizer, and refresh if it is time; whether any layer was refreshed."""
        self.steps += 1
        return self.steps % self.every == 0 and self.refresh()

    def refresh(self) -> bool:
        """Refresh now every layer that has collected at least two samples; whether there was one."""
        refreshed = False
        for layer in self._layers().values():
            transport = self.momentum == "transport"
            done = layer.refresh([(self._velocity(layer.v), self._velocity(layer.d))] if transport else ())
            if done and not transport:
                for parameter in layer.parameters(recurse=False):
                    self.optimizer.state.pop(parameter, None)
            refreshed = refreshed or done
        return refreshed

    def _velocity(self, parameter: Tensor | None) -> Tensor | None:
        velocity: Tensor | None = None
        if parameter is not None:
            velocity = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
        return velocity

    def state_dict(self) -> dict[str, Any]:
        """The number of steps so far; everything else is in the states of the model and the optimizer."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a number of steps."""
        self.steps = int(state_dict["steps"])
