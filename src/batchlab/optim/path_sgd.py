"""Gradient descent in the geometry of paths (Neyshabur, Salakhutdinov & Srebro 2015, Path-SGD)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchlab.optim.path_norm import path_sums

__all__ = ["PathSGD"]


class PathSGD(torch.optim.Optimizer):
    """Stochastic gradient descent that does not see how a ReLU network's weights are balanced between its layers.

    κ = Σ over paths through w of Π of the other weights, squared        (= ½ ∂²J/∂w², J = Σ over paths of Π w²)
    v = momentum · v + ∂loss/∂w / max(κ, eps · largest κ of the parameter)
    w = w - lr · v                                                         entries with κ = 0 rest

    To multiply what enters a ReLU unit, weights and bias, by a > 0 and to divide what leaves it by a changes no output
    of the network. It changes what SGD does next, and after one step the two networks differ. The steps of Path-SGD
    are multiplied by a and 1/a too: the networks stay the same function, to rounding.

    κ comes from one pass, forward and backward, of the model with squared parameters on one sample of ones, in
    float64. Linear and convolutional layers, sums (residual connections), ReLU, LeakyReLU, dropout, pooling, and
    products with a parameter, a buffer or a number are understood. A maximum over a window counts the paths through all
    of it. A weight at several places has the sum of κ over its places. Anything else is refused: normalizations,
    sigmoids and attention have no path norm. Parameters that are frozen or not given count in the paths of the others.

    Where κ is 0, every path through w has another weight that is 0; the network's gradient is 0 as well, and the entry
    stays. A weight beside weights that are nearly 0 takes large steps: κ shrinks as their square, the gradient only as
    they do. `eps` bounds this, at the price of exact invariance.

    κ has the scale of (path norm / w)², which grows with depth and width: a learning rate for SGD says nothing about
    one for Path-SGD. Products of squares must fit into float64, 1e-308 to 1e308: 30 layers whose sums of squares are
    1e10 each do. Below, κ is 0 and the weight rests; above, `step` raises. In float32 parameters a κ below 1e-38 of the
    largest in the parameter is 0, too.

    Args:
        params: parameters of the model, or groups of them, as for any torch optimizer.
        lr: learning rate, 0 or more.
        momentum: share of v that is kept, from 0 to below 1; it keeps the invariance.
        eps: smallest κ, as a share of the largest in the same parameter, from 0 to 1.
        model: the network; its forward hooks see the pass on ones, too.
        example_input: a batch for it, or several for a model of several inputs; only shapes are looked at.
        update_every: steps for which κ is used before it is computed again.

    Raises:
        ValueError: an option out of its range, a parameter that is not the model's, an example that is not a batch of
            real numbers, or a model without path norm (the message names layer and function).
        RuntimeError: in `step`, κ is infinite or NaN; nothing was changed.

    Source: Neyshabur, Salakhutdinov & Srebro 2015, section 4; the sum over places as κ⁽¹⁾ in Neyshabur et al. 2016.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    >>> for parameter, values in zip(model.parameters(), ([[2.0, 1.0]], [[3.0]], [2.0])):
    ...     parameter.data = torch.tensor(values)
    >>> x = torch.tensor([[1.0, 1.0]])
    >>> optimizer = PathSGD(model.parameters(), lr=0.5, model=model, example_input=x)
    >>> optimizer.path_norm().item()
    7.0
    >>> {name: kappa.tolist() for name, kappa in optimizer.kappas().items()}
    {'0.weight': [[9.0, 9.0]], '2.weight': [[5.0]], '2.bias': [1.0]}
    >>> model(x).sum().backward()
    >>> optimizer.step()
    >>> model[2].weight.item(), model[2].weight.grad.item()   # 3 - 0.5 · 3/5
    (2.70..., 3.0)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0.0,
        eps: float = 0.0,
        *,
        model: nn.Module,
        example_input: Tensor | Sequence[Tensor],
        update_every: int = 1,
    ) -> None:
        _check_model(model)
        if isinstance(update_every, bool) or not isinstance(update_every, int) or update_every < 1:
            raise ValueError(f"update_every is {update_every}; it must be a whole number of steps, 1 or more")
        self._model = model
        self._shapes = _shapes(example_input)
        self._update_every = update_every
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "steps": 0})
        path_sums(model, self._shapes, [])  # refuses what it does not know, before any training

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model with options of their own; see `torch.optim.Optimizer.add_param_group`."""
        given = self.defaults | param_group
        if not given["lr"] >= 0:
            raise ValueError(f"lr is {given['lr']}; it must be 0 or more")
        if not 0 <= given["momentum"] < 1:
            raise ValueError(f"momentum is {given['momentum']}; it must be from 0 to below 1")
        if not 0 <= given["eps"] <= 1:
            raise ValueError(f"eps is {given['eps']}; it must be from 0 to 1, a share of the largest κ")
        super().add_param_group(param_group)
        own = {id(parameter) for parameter in self._model.parameters()}
        strange = [tuple(p.shape) for p in self.param_groups[-1]["params"] if id(p) not in own]
        if strange:
            self.param_groups.pop()
            raise ValueError(
                f"parameters of shapes {strange} are not the model's, so no path leads through them; "
                "give the parameters of the model that is given"
            )

    def path_norm(self) -> Tensor:
        """√J: the root of the sum over all paths of the product of squared weights, in float64."""
        return path_sums(self._model, self._shapes, [])[0].sqrt()

    def kappas(self) -> dict[str, Tensor]:
        """κ of each parameter of the optimizer, by its name in the model, in float64; computed anew."""
        held = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        named = {name: p for name, p in self._model.named_parameters() if id(p) in held}
        return dict(zip(named, path_sums(self._model, self._shapes, list(named.values()))[1], strict=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a closure, if given, computes the loss again first, and its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        divisors = self._current_divisors(moved) if moved else {}
        for group in self.param_groups:
            lr, momentum = float(group["lr"]), group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                divisor, scale = divisors[parameter]
                if not momentum:
                    parameter.addcdiv_(parameter.grad, divisor, value=-lr / scale)
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["momentum_buffer"].mul_(momentum).addcdiv_(parameter.grad, divisor, value=1 / scale)
                parameter.add_(state["momentum_buffer"], alpha=-lr)
            group["steps"] += 1 if moved else 0
        return loss

    def _current_divisors(self, moved: list[Tensor]) -> dict[Tensor, tuple[Tensor, float]]:
        if self._update_every == 1:
            return self._divisors(moved)
        due = self.param_groups[0]["steps"] % self._update_every == 0
        if due or any("divisor" not in self.state[parameter] for parameter in moved):
            every = [parameter for group in self.param_groups for parameter in group["params"]]
            for parameter, (divisor, scale) in self._divisors(every).items():
                self.state[parameter].update(divisor=divisor, scale=scale)
        return {p: (self.state[p]["divisor"], self.state[p]["scale"]) for p in moved}

    def _divisors(self, parameters: list[Tensor]) -> dict[Tensor, tuple[Tensor, float]]:
        """κ as divisor · scale, in the parameter's dtype or float32."""
        kappas = path_sums(self._model, self._shapes, parameters)[1]
        largest = torch.stack([kappa.amax() if kappa.numel() else kappa.sum() for kappa in kappas]).tolist()
        if not all(math.isfinite(value) for value in largest):
            raise RuntimeError(
                "κ of Path-SGD is infinite or NaN, and nothing was changed: weights have diverged, or products of "
                "their squares are above 1e308; lower lr, or start from smaller weights"
            )
        eps = {parameter: group["eps"] for group in self.param_groups for parameter in group["params"]}
        found = {}
        for parameter, kappa, top in zip(parameters, kappas, largest, strict=True):
            scale = min(max(top, 1e-30), 1e30)  # lr / scale has to fit into float32 as well
            if eps[parameter]:
                kappa = kappa.clamp(min=eps[parameter] * top)
            # Not in place: autograd may give several parameters one and the same κ.
            divisor = (kappa / scale).to(torch.promote_types(parameter.dtype, torch.float32))
            # Infinite where κ is 0, so that the quotient is 0.
            found[parameter] = divisor.masked_fill_(divisor == 0, torch.inf), scale
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, with κ in the dtype it was saved in."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, held, strict=True):
            divisor = state_dict["state"].get(number, {}).get("divisor")
            if divisor is not None:  # torch has cast it to the parameter's dtype, which may be a short one
                self.state[parameter]["divisor"] = divisor.to(parameter.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("_model", "_shapes", "_update_every")}
        return super().__getstate__() | own


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be the nn.Module whose parameters are trained")
    inner = next((name for name in ("_orig_mod", "module") if isinstance(getattr(model, name, None), nn.Module)), None)
    if inner == "_orig_mod" or (inner and type(model).__module__.startswith("torch.nn.parallel")):
        raise ValueError(
            f"model is wrapped in {type(model).__name__}; give model.{inner}, whose parameters are the same"
        )


def _shapes(example_input: Tensor | Sequence[Tensor]) -> list[tuple[int, ...]]:
    examples = [example_input] if isinstance(example_input, Tensor) else list(example_input)
    for example in examples:
        if not isinstance(example, Tensor):
            raise ValueError(f"example_input holds a {type(example).__name__}; it must be a tensor or several")
        if example.ndim < 2 or not example.is_floating_point():
            raise ValueError(
                f"example_input has shape {tuple(example.shape)} and dtype {example.dtype}; "
                "it must be a batch of real numbers, samples first"
            )
    if not examples:
        raise ValueError("example_input is empty; it must be a batch for the model")
    return [tuple(example.shape) for example in examples]
