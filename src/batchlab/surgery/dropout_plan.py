"""Which dropouts of a model become batchwise, which containers save the work they drop, and why not the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from batchlab.nn import BatchwiseDropout
from batchlab.nn.submatrix_layers import Step, flatten, has_hooks
from batchlab.nn.submatrix_sequential import CHAINS
from batchlab.surgery.dataflow import describe, owners
from batchlab.surgery.dropout_dims import STOCK, CannotPlaceError, View, feature_dim

__all__ = ["Found", "Plan", "find_dropouts", "functional_dropouts", "outermost_chains", "plan_conversion"]

COMPOUNDS: Final = (nn.MultiheadAttention, nn.RNNBase, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

FUNCTIONS: Final = frozenset(
    [
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.alpha_dropout),
    ]
)

BY_HAND: Final = "Put a BatchwiseDropout(dim=...) there by hand, or convert the other submodules one by one"


class Found(NamedTuple):
    """Dropouts by name: torch's own, ones that are batchwise already, and those that stay, with the reason."""

    stock: dict[str, nn.Module]
    batchwise: dict[str, nn.Module]
    left: list[tuple[str, str]]


class Plan(NamedTuple):
    """What to do to a model.

    Attributes:
        dims: stock dropouts that become batchwise, by name, and the feature dimension of each.
        chains: names of the Sequentials that become SubmatrixSequentials.
        masking: of the dropouts that become batchwise, those that save nothing, and why.
        left: dropouts that stay, and why.
    """

    dims: dict[str, int]
    chains: list[str]
    masking: list[tuple[str, str]]
    left: list[tuple[str, str]]


def _drops(compound: nn.Module) -> bool:
    rates: list[Any] = [part.p for part in compound.modules() if isinstance(part, _DropoutNd)]
    rates += [getattr(part, "dropout", 0) for part in compound.modules()]
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def _why_left(module: nn.Module) -> str | None:
    if isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
        return "what it drops does not become zero, so nothing can be left out"
    if type(module) not in STOCK:
        return "a class that is not known may drop in another way"
    return "its forward was replaced on the instance" if "forward" in vars(module) else None


def find_dropouts(model: nn.Module) -> Found:
    """Sort the dropout modules of a model; the insides of torch's compound layers are not looked at."""
    found = Found({}, {}, [])
    hidden = {
        id(part)
        for module in model.modules()
        if isinstance(module, COMPOUNDS)
        for part in module.modules()
        if part is not module
    }
    for name, module in model.named_modules():
        if id(module) in hidden:
            continue
        what = f"{type(module).__name__} '{name}'"
        if isinstance(module, COMPOUNDS):
            if _drops(module):
                found.left.append((what, "it drops inside, by functions of its own"))
        elif isinstance(module, BatchwiseDropout):
            found.batchwise[name] = module
        elif isinstance(module, _DropoutNd):
            reason = _why_left(module)
            if reason is None:
                found.stock[name] = module
            else:
                found.left.append((what, reason))
    return found


def outermost_chains(model: nn.Module) -> dict[str, nn.Sequential]:
    """The plain Sequentials that no other one takes along, by name."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: set[tuple[int, bool]] = set()

    def visit(module: nn.Module, inside: bool) -> Iterator[tuple[str, nn.Sequential]]:
        if (id(module), inside) in seen:
            return
        seen.add((id(module), inside))
        is_chain = type(module) in CHAINS
        if type(module) is nn.Sequential and not inside:
            yield names[id(module)], module
        for child in module.children():
            yield from visit(child, is_chain and type(child) in CHAINS and not has_hooks(child))

    return dict(visit(model, False))


def functional_dropouts(view: View) -> list[tuple[str, str]]:
    """Calls of dropout functions in a trace."""

    def drops(node: fx.Node) -> bool:
        inside = [view.module.get_submodule(name) for name in owners(node)]
        if node.op != "call_function" or any(isinstance(module, (_DropoutNd, *COMPOUNDS)) for module in inside):
            return False  # those are named already
        if node.target is F.scaled_dot_product_attention:
            return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0))
        rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        on = node.kwargs.get("training", node.kwargs.get("train", node.args[2] if len(node.args) > 2 else True))
        return node.target in FUNCTIONS and on is not False and not (isinstance(rate, (int, float)) and rate == 0)

    of = f" of '{view.prefix}'" if view.prefix else ""
    calls = [describe(node, view.module) + of for node in view.flow.graph.nodes if drops(node)]
    return [(call, "a function, not a module: use BatchwiseDropout there") for call in dict.fromkeys(calls)]


def _next_to_a_product(steps: list[Step], index: int, dropouts: dict[int, str]) -> bool:
    """Whether a linear or convolution layer that can work on a part feeds a dropout, or is fed by it."""
    for direction in (-1, 1):
        at = index + direction
        while 0 <= at < len(steps):
            if steps[at].kind in ("linear", "convolution"):
                return True
            if steps[at].kind == "opaque" and id(steps[at].module) not in dropouts:
                break
            at += direction
    return False


def _why_no_chain(
    steps: list[Step], chain: str, called: dict[str, set[int | None]], names: dict[int, str]
) -> str | None:
    if chain not in called:
        return f"the nn.Sequential '{chain}' around it is not called as a whole"
    inputs = [called.get(names[id(step.module)], {None}) for step in steps]
    if any(None in seen for seen in inputs):
        return f"not everything in the nn.Sequential '{chain}' takes one tensor"
    if any("forward" in vars(step.module) for step in steps):
        return f"a module in the nn.Sequential '{chain}' has a forward that was replaced on the instance"
    return None


def _dims(found: Found, called: dict[str, set[int | None]], views: list[View]) -> dict[str, int]:
    dims = {}
    for name, module in found.stock.items():
        if name not in called:
            continue
        try:
            dims[name] = feature_dim(name, module, called[name], views)
        except CannotPlaceError as error:
            raise ValueError(f"{type(module).__name__} '{name}' cannot be converted: {error}. {BY_HAND}") from None
    return dims


def _why_only_mask(steps: list[Step], index: int, dropouts: dict[int, str]) -> str | None:
    if has_hooks(steps[index].module):
        return "it has hooks, which are to see all features"
    if not _next_to_a_product(steps, index, dropouts):
        return "in its nn.Sequential no Linear or Conv (with groups=1) is next to it"
    return None


def plan_conversion(model: nn.Module, found: Found, called: dict[str, set[int | None]], views: list[View]) -> Plan:
    """Decide for each dropout and each Sequential.

    Args:
        model: to be converted.
        found: its dropouts.
        called: what a training forward showed.
        views: traces of the model or of parts of it.

    Raises:
        ValueError: a dropout of which it is not clear what its features are.
    """
    dims = _dims(found, called, views)
    names = {id(module): name for name, module in model.named_modules()}
    dropouts = {id(module): name for name, module in (found.stock | found.batchwise).items() if name in called}
    chains: list[str] = []
    saving: set[str] = set()
    reasons: dict[str, str] = {}
    for chain, container in outermost_chains(model).items():
        steps = flatten(container, CHAINS)
        obstacle = _why_no_chain(steps, chain, called, names)
        for index, step in enumerate(steps):
            name = dropouts.get(id(step.module))
            if name is None:
                continue
            reason = obstacle or _why_only_mask(steps, index, dropouts)
            if reason is not None:
                reasons[name] = reason
                continue
            saving.add(name)
            if chain not in chains:
                chains.append(chain)
    plan = Plan(dims, chains, [], list(found.left))
    for name, module in found.stock.items():
        what = f"{type(module).__name__} '{name}'"
        if name not in dims:
            plan.left.append((what, "the example does not reach it"))
        elif name not in saving and module.p != 0:
            parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
            plan.masking.append((what, reasons.get(name, f"it is called by {parent}, not by an nn.Sequential")))
    return plan
