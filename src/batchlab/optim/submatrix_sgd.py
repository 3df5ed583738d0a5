"""Gradient descent with momentum that touches only what batchwise dropout kept (Graham et al. 2015, their code)."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from batchlab.functional.submatrix import ACCEPTS
from batchlab.functional.submatrix_step import momentum_step

__all__ = ["SubmatrixSGD"]


class _Asked:
    """How many living optimizers ask for a parameter's gradient in short; false if none does."""

    def __init__(self) -> None:
        self.count = 0

    def __bool__(self) -> bool:
        return self.count > 0

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # optimizers are not saved with a model: something false, that any file may contain


def _stop_accepting(parameters: list[weakref.ref[Tensor]]) -> None:
    for reference in parameters:
        parameter = reference()
        asked = getattr(parameter, ACCEPTS, None)
        if isinstance(asked, _Asked):
            asked.count -= 1
            if not asked:
                delattr(parameter, ACCEPTS)


class SubmatrixSGD(torch.optim.Optimizer):
    """Stochastic gradient descent that changes kept rows and columns of weights and momentum, and no others.

    g = ∂loss/∂w + weight_decay · w
    v = momentum · v + g
    w = w - lr · (g + momentum · v if nesterov else v)        for the entries that took part in the batch

    A dense optimizer reads and writes the whole weight, gradient and momentum for the quarter of the entries that a
    batch at p = 0.5 trains. This one does not, and what rests is different:

    * Momentum of an entry at rest neither decays nor moves the weight. Torch's `SGD`, on dense gradients, lets every
      weight coast on while it is dropped. Over many batches an entry that takes part every fourth time has here the
      momentum of its last few own gradients.
    * Weight decay shrinks an entry when it takes part. At p = 0.5 that is every fourth batch for a weight between two
      dropouts; to shrink it as fast as a dense optimizer, multiply `weight_decay` by four.

    Where nothing was dropped (other layers, or dropout off) it is `torch.optim.SGD` without dampening, to rounding,
    and `state_dict` is exchanged with it both ways.

    While the optimizer lives, the gradients of its parameters from a `SubmatrixSequential` are `SubmatrixGradient`s:
    tensors that store the kept block. Clipping, `GradScaler` and accumulation over batches (entries take part that any
    of them kept) work as always. Wrappers that send gradients between machines need dense ones: use torch's optimizers.

    Args:
        params: parameters, or groups of them, as for any torch optimizer.
        lr: learning rate, 0 or more.
        momentum: share of v that is kept, from 0 to below 1.
        weight_decay: L2 coefficient, 0 or more.
        nesterov: look ahead along the momentum, which must then be above 0.

    Raises:
        ValueError: an option out of its range.

    Source: Graham, Reizenstein & Robinson 2015; the authors' code updates the submatrix alone.

    >>> import torch
    >>> from torch import nn
    >>> from batchlab.nn import BatchwiseDropout, SubmatrixSequential
    >>> net = SubmatrixSequential(nn.Linear(4, 6), nn.ReLU(), BatchwiseDropout(0.5), nn.Linear(6, 2), mode="submatrix")
    >>> optimizer = SubmatrixSGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> net(torch.ones(3, 4)).sum().backward()
    >>> net[0].weight.grad
    SubmatrixGradient(shape=(6, 4), kept=3 x 4)
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        defaults["dampening"] = 0  # torch's SGD reads it from a state that it loads
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see `torch.optim.Optimizer.add_param_group`."""
        given = self.defaults | param_group
        if not given["lr"] >= 0:
            raise ValueError(f"lr is {given['lr']}; it must be 0 or more")
        if not 0 <= given["momentum"] < 1:
            raise ValueError(f"momentum is {given['momentum']}; it must be from 0 to below 1")
        if not given["weight_decay"] >= 0:
            raise ValueError(f"weight_decay is {given['weight_decay']}; it must be 0 or more")
        if given["nesterov"] and given["momentum"] == 0:
            raise ValueError("nesterov looks ahead along the momentum, which is 0; set momentum above 0")
        refused = {name: given[name] for name in ("dampening", "maximize") if given.get(name)}
        if refused:
            raise ValueError(f"a group has {refused}, which SubmatrixSGD does not do; take torch.optim.SGD")
        super().add_param_group(param_group)
        self._accept(self.param_groups[-1]["params"])

    def _accept(self, parameters: list[Tensor]) -> None:
        if not hasattr(self, "_accepting"):
            self._accepting: list[weakref.ref[Tensor]] = []
            weakref.finalize(self, _stop_accepting, self._accepting)
        for parameter in parameters:
            if not isinstance(getattr(parameter, ACCEPTS, None), _Asked):
                setattr(parameter, ACCEPTS, _Asked())
            getattr(parameter, ACCEPTS).count += 1
            self._accepting.append(weakref.ref(parameter))

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            refused = {name: group[name] for name in ("dampening", "maximize") if group.get(name)}
            if refused:
                raise ValueError(
                    f"the state has {refused}, which SubmatrixSGD does not do; continue with torch.optim.SGD"
                )
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)
            group.setdefault("dampening", 0)
        if not hasattr(self, "_accepting"):  # a copy or a pickle, not a state that is loaded
            for group in self.param_groups:
                self._accept(group["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or with `set_to_none=False` fill them with zeros; as torch's, at less cost a call."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a closure, if given, computes the loss again first, and its result is returned."""
        given = () if closure is None else (closure,)
        return (_observed if self._is_observed() else _step)(self, *given)

    # Torch would wrap `step` for hooks and profilers, which costs a small network more than its step's arithmetic.
    step.hooked = True  # type: ignore[attr-defined]

    def _is_observed(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        )

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        velocity: Tensor | None = state.get("momentum_buffer")
        if velocity is None:
            velocity = state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return velocity


@torch.no_grad()
def _step(optimizer: SubmatrixSGD, closure: Callable[[], Any] | None = None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    for group in optimizer.param_groups:
        weights = [parameter for parameter in group["params"] if parameter.grad is not None]
        momentum = group["momentum"]
        velocities = [optimizer._velocity(parameter) for parameter in weights] if momentum else []
        gradients = [parameter.grad for parameter in weights]
        decay, nesterov = group["weight_decay"], group["nesterov"]
        momentum_step(weights, velocities, gradients, float(group["lr"]), momentum, decay, nesterov)
    return loss


_observed = torch.optim.Optimizer.profile_hook_step(_step)
