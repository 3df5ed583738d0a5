"""Path norm of a network and its derivatives, by one pass on ones with every coefficient squared.

J = Σ over paths of Π w² is the sum of the outputs of the network with squared parameters on an input of ones, and
κ = ∂J/∂(w²) is its gradient with respect to the squares; with respect to w it would be 2 w κ. See
`batchlab.reference.path_norm` for the sums themselves (Neyshabur, Salakhutdinov & Srebro 2015, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from batchlab.optim.path_rules import (
    CONSTANTS,
    IN_PLACE,
    ON_COEFFICIENTS,
    PLAIN_FACTS,
    PRODUCTS,
    REASONS,
    RULES,
    SAME,
    Unknown,
    plain,
)

__all__ = ["path_sums"]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(_tensors(value))
    return found


def _name(func: Callable[..., Any]) -> str:
    if func.__name__ == "__get__":
        return str(func.__self__.__name__)  # type: ignore[attr-defined]  # a property: shape, T, data
    return func.__name__.strip("_")


class _Squared(TorchFunctionMode):
    """Run a network on sums of squares: each function by its rule, and none that has no rule.

    Every floating tensor is either a coefficient (a parameter or buffer, squared, or something moved or multiplied from
    these) or a value, which came from the input. Anything else was computed from something that is not squared.
    """

    def __init__(self, coefficients: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__()
        # The tensors themselves are kept, so that no other gets their id.
        self._coefficients = {id(tensor): tensor for tensor in coefficients}
        self._values = {id(tensor): tensor for tensor in inputs}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in PLAIN_FACTS:
            return func(*args, **kwargs)
        operands = [t for t in _tensors((*args, *kwargs.values())) if t.is_floating_point()]
        if name in CONSTANTS or not operands:
            result = func(*args, **kwargs)
            if name in CONSTANTS:
                self._note(result, self._coefficients)
            return result  # integers carry no paths; other numbers are found out where they are used
        result = self._apply(name, func, operands, args, kwargs)
        fixed = all(id(tensor) in self._coefficients for tensor in operands)
        self._note(result, self._coefficients if fixed else self._values)
        return result

    def _apply(
        self, name: str, func: Any, operands: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        rule = RULES.get(name)
        if rule is None and operands and all(id(tensor) in self._coefficients for tensor in operands):
            raise Unknown(f"computes a weight by {name}: paths are told by the weight itself; merge the weight first")
        if rule is None:
            reason = REASONS.get(name, "it is not known to be a sum over paths")
            raise Unknown(f"uses {name}: {reason}")
        if not torch.is_grad_enabled():
            raise Unknown(f"computes {name} without gradients (no_grad, or an autograd function of its own)")
        values = [tensor for tensor in operands if id(tensor) in self._values]
        fixed = [tensor for tensor in operands if id(tensor) in self._coefficients]
        if len(values) + len(fixed) < len(operands):
            raise Unknown(f"gives {name} a tensor that is no parameter or buffer and not from the input; register it")
        if name in PRODUCTS and len(values) > 1:
            raise Unknown(f"uses {name} on two values: a path has one weight for an edge, a parameter or buffer")
        if not values and name not in ON_COEFFICIENTS:
            raise Unknown(f"computes a weight by {name}: paths are told by the weight itself; merge the weight first")
        if not _changes(func):
            return _call(rule, func, name, args, kwargs)
        target = args[0] if args else None
        if name not in IN_PLACE or not isinstance(target, Tensor) or id(target) not in self._values:
            raise Unknown(f"changes a tensor in place by {name}; use the form that returns a new one")
        # Who holds the tensor sees the change, as in the network; what autograd keeps is the copy.
        return target.copy_(_call(rule, func, name, (target.clone(), *args[1:]), kwargs))

    def _note(self, result: Any, where: dict[int, Tensor]) -> None:
        for tensor in _tensors([result]):
            where[id(tensor)] = tensor

    def holds_value(self, tensor: Any) -> bool:
        """Whether it came from the input."""
        return id(tensor) in self._values


def _changes(func: Callable[..., Any]) -> bool:
    """Whether it is called for a change of its first argument; `same` sees to its own functions."""
    name = func.__name__
    return name.endswith("_") and _name(func) not in SAME and (not name.endswith("__") or name.startswith("__i"))


def _call(rule: Callable[..., Any], func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if rule is plain:
        return func(*args, **kwargs)
    named = {{"input": "x", "self": "x"}.get(key, key): value for key, value in kwargs.items()}
    try:
        return rule(func, *args, **named)
    except TypeError as error:
        raise Unknown(f"calls {name} in a way that is not known here: {error}") from error


def _where(model: nn.Module, traceback: TracebackType | None) -> str:
    """The innermost layer that was running."""
    names = {module: name for name, module in model.named_modules()}
    found: nn.Module = model
    while traceback is not None:
        running = traceback.tb_frame.f_locals.get("self")
        if isinstance(running, nn.Module) and running in names:
            found = running
        traceback = traceback.tb_next
    name = names[found]
    return f"{name} ({type(found).__name__})" if name else type(found).__name__


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropouts of any kind let all paths through; `train` is not called, for layers that do more in it.

    Compiled parts run as they were written: their graphs are not made of squares.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training


def path_sums(
    model: nn.Module, shapes: Sequence[Sequence[int]], wanted: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """J of the model for one sample, and κ of the wanted parameters, in float64.

    The model's parameters, buffers, modes and random numbers are as before. A weight at several places (a convolution,
    a shared layer) has the sum of κ over its places.

    Args:
        model: a network of linear layers and positively homogeneous activations.
        shapes: of its inputs, batches; one sample is taken.
        wanted: parameters of the model.

    Raises:
        ValueError: the model has a function whose sums over paths are not defined.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    >>> for parameter, values in zip(model.parameters(), ([[2.0, 1.0]], [[3.0]], [2.0])):
    ...     parameter.data = torch.tensor(values)
    >>> path_sums(model, [(8, 2)], list(model.parameters()))[0].item()
    49.0
    """
    parameters = dict(model.named_parameters())
    if any(tensor.is_complex() for tensor in (*parameters.values(), *model.buffers())):
        raise ValueError("the path norm is not defined: the model has complex parameters; they must be real")
    squares = {name: p.detach().to(torch.float64, copy=True).square_() for name, p in parameters.items()}
    places = {id(p): name for name, p in parameters.items()}
    asked = [squares[places[id(p)]].requires_grad_() for p in wanted]
    buffers = {
        name: b.to(torch.float64).square() if b.is_floating_point() else b.clone() for name, b in model.named_buffers()
    }
    device = next((s.device for s in squares.values()), None)
    ones = [torch.ones(1, *shape[1:], dtype=torch.float64, device=device) for shape in shapes]
    mode = _Squared([*squares.values(), *buffers.values()], ones)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            with _evaluating(model), mode:
                output = functional_call(model, squares | buffers, tuple(ones))
        except Unknown as unknown:
            where = _where(model, unknown.__traceback__)
            raise ValueError(f"the path norm is not defined: {where} {unknown}") from None
        if not mode.holds_value(output):
            raise ValueError(
                f"the model returned {type(output).__name__}; it must return one tensor, computed from its input"
            )
        total = output.sum()
        if not total.requires_grad:
            return total, [torch.zeros_like(s) for s in asked]
        gradients = torch.autograd.grad(total, asked, allow_unused=True)
    found = [torch.zeros_like(s) if g is None else g for s, g in zip(asked, gradients, strict=True)]
    return total.detach(), [kappa.detach() for kappa in found]
