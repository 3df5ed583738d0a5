"""Do two traces make the same calls in the same order on the same inputs, apart from modules that were added?"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn

from batchlab.surgery.dataflow import Dataflow

__all__ = ["calls_without"]


def calls_without(flow: Dataflow, model: nn.Module, added: Collection[nn.Module]) -> list[tuple[Any, ...]]:
    """List every call as (kind, what, numbers of the calls it takes inputs from, arguments), without the added modules.

    Modules are told by identity, not by name: names may have moved.
    """
    left_out = {id(module) for module in added}
    numbers: dict[Any, int] = {}
    calls: list[tuple[Any, ...]] = []
    for node in flow.graph.nodes:
        inputs = tuple(numbers[source] for source in node.all_input_nodes)
        what: Any = node.target
        if node.op == "call_module":
            what = id(model.get_submodule(str(node.target)))
            if what in left_out and len(inputs) == 1:
                numbers[node] = inputs[0]
                continue
        elif node.op == "get_attr":
            what = None
        # With the numbers among the arguments: the length of a container, say, which a module more would change.
        given = repr(fx.node.map_arg((node.args, node.kwargs), lambda source: f"call {numbers[source]}"))
        numbers[node] = len(calls)
        calls.append((node.op, what, inputs, given))
    return calls
