"""Who feeds whom in a model: a symbolic trace (torch.fx) that stops at layers, and questions about it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import fx, nn

from batchlab.surgery.copies import copy_to_run, preserved_random_state, remove_forward_hooks
from batchlab.surgery.example import Example, map_tensors
from batchlab.surgery.layers import Norm, is_linear_or_conv
from batchlab.surgery.nonlinearities import NONLINEAR_MODULES

__all__ = ["Dataflow", "describe", "input_of", "is_leaf", "mutates", "owners", "trace"]


class Dataflow(NamedTuple):
    """A traced model.

    Attributes:
        graph: one node per call; modules are named as in the model.
        entered: names of the containers whose forward ran.
    """

    graph: fx.Graph
    entered: frozenset[str]

    def calls(self, name: str) -> list[fx.Node]:
        """Every call of the module `name`."""
        return [node for node in self.graph.nodes if node.op == "call_module" and node.target == name]

    def reads(self, name: str) -> bool:
        """Say whether the forward uses a parameter or buffer of the module `name` without calling the module."""
        return any(n.op == "get_attr" and str(n.target).rpartition(".")[0] == name for n in self.graph.nodes)


def is_leaf(module: nn.Module) -> bool:
    """Say whether a module is one node of the graph: layers of torch.nn and batchlab.nn, and what extends them."""
    if isinstance(module, (Norm, *NONLINEAR_MODULES, torch.jit.ScriptModule)) or is_linear_or_conv(module):
        return True
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.", "batchlab.nn.")) and not isinstance(
        module, nn.Sequential
    )


class _Symbol(fx.Proxy):
    """A tensor of the trace. Fx alone records `x += 1` as an addition; here it is seen to write into x."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


IN_PLACE: Final = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.iand, operator.ior, operator.ixor),
)
for _operator in IN_PLACE:
    setattr(_Symbol, f"__{_operator.__name__}__", _in_place(_operator))


class _Tracer(fx.Tracer):
    def __init__(self, example: Example | None) -> None:
        super().__init__()
        self.example = example
        self.entered: set[str] = set()

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: ARG002  # fx's signature
        concrete_args: Any = None,  # noqa: ARG002
    ) -> tuple[Any, list[Any]]:
        # Every tensor of the example becomes a symbol; what is not a tensor (flags, None) keeps its value, and what
        # the example leaves out its default, so that the graph is that of the call the caller will make.
        if self.example is None:
            args, kwargs = tuple(self._symbol(name) for name in _required(root_fn)), {}
        else:
            args, kwargs = self._symbols(self.example.args), self._symbols(self.example.kwargs)
        return lambda *_: root_fn(self.root, *args, **kwargs), []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def _symbol(self, name: str) -> fx.Proxy:
        return self.create_proxy("placeholder", name, (), {})

    def _symbols(self, value: Any) -> Any:
        return map_tensors(lambda _: self._symbol("input"), value)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return is_leaf(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        self.entered.add(name)
        if is_leaf(m) or next(m.children(), None) is not None:
            return super().call_module(m, forward, args, kwargs)
        known = set(self.graph.nodes)
        depth = len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            # A module without parts holds no layer, so what it does inside does not matter: one node for all of it.
            for node in reversed(self.graph.nodes):
                if node not in known and node.op != "get_attr":  # parameters' nodes are cached by fx
                    self.graph.erase_node(node)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            return self.create_proxy("call_module", name, args, kwargs)


def _required(forward: Callable[..., Any]) -> Iterator[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return (p.name for p in parameters if p.kind in positional and p.default is p.empty)


def trace(model: nn.Module, example: Example | None, *, training: bool, way_out: str) -> Dataflow:
    """Trace a copy of `model`; the model itself, the random state and what hooks record stay as they are.

    Raises:
        ValueError: the forward depends on values, so that no one graph describes it; `way_out` ends the message.
    """
    if is_leaf(model):
        return Dataflow(fx.Graph(), frozenset())
    probe = copy_to_run(model).train(training)
    remove_forward_hooks(probe)
    tracer = _Tracer(example)
    try:
        if "forward" in vars(model):
            raise ValueError("its forward was replaced on the instance, which torch.fx does not see")
        with preserved_random_state(model), torch.no_grad():
            graph = tracer.trace(probe)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the data flow of {type(model).__name__} cannot be traced by torch.fx ({reason}). Traceable is a forward "
            f"whose control flow does not depend on tensors or their shapes. {way_out}"
        ) from error
    return Dataflow(graph, frozenset(tracer.entered))


def input_of(node: fx.Node) -> fx.Node | None:
    """Return the node that a layer or nonlinearity takes as its input."""
    value = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    return value if isinstance(value, fx.Node) else None


def owners(node: fx.Node) -> list[str]:
    """Names of the containers inside which the call happens, outermost first."""
    names = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return [name for name in names if not (node.op == "call_module" and name == node.target)]


def describe(node: fx.Node, model: nn.Module) -> str:
    """Say in words what a node is."""
    if node.op == "call_module":
        return f"{type(model.get_submodule(str(node.target))).__name__} '{node.target}'"
    if node.op == "placeholder":
        return "the model's input"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    inside = owners(node)
    return f"{name}() in '{inside[-1]}'" if inside else f"{name}()"


def mutates(node: fx.Node, model: nn.Module) -> bool:
    """Say whether a call writes into its input, as far as its name and arguments tell."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    assigned = node.target in (*IN_PLACE, operator.setitem)
    return in_place or assigned or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
