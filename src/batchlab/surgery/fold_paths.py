"""From a normalization to the layer before or after it, through what does nothing in inference."""

from __future__ import annotations

from typing import Final

from torch import fx, nn
from torch.nn import functional as F

from batchlab.nn import BatchwiseDropout, Dropout, GaussianDropout, UniformDropout
from batchlab.surgery.dataflow import describe, input_of, mutates, owners
from batchlab.surgery.fold_algebra import CannotFoldError
from batchlab.surgery.fold_checks import has_hooks, is_layer

__all__ = ["layer_after", "layer_before"]

PASSING: Final = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(BatchwiseDropout, Dropout, GaussianDropout, UniformDropout),
)
PASSING_FUNCTIONS: Final = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def _passes(node: fx.Node, model: nn.Module, gone: set[str]) -> bool:
    """Say whether a call returns its input as it is: identity, dropout in inference, a normalization folded away."""
    if node.op == "call_function" and node.target in PASSING_FUNCTIONS:
        return node.kwargs.get("training") is False
    if node.op != "call_module":
        return False
    module = model.get_submodule(str(node.target))
    return node.target in gone or (type(module) in PASSING and not module.training and not has_hooks(module))


def _only_user(node: fx.Node, model: nn.Module) -> fx.Node:
    if len(node.users) != 1:
        raise CannotFoldError(f"the output of {describe(node, model)} is used {len(node.users)} times")
    return next(iter(node.users))


def _check_hooks(path: list[fx.Node], model: nn.Module) -> None:
    """Refuse if a container between two ends of the path has hooks: they see, or change, what passes."""
    inside = [frozenset(owners(node)) for node in path]
    for name in sorted(frozenset[str]().union(*inside) - inside[0].intersection(*inside)):
        if has_hooks(model.get_submodule(name)):
            raise CannotFoldError(f"'{name}' lies between the two and has forward hooks")


def layer_before(norm: fx.Node, model: nn.Module, gone: set[str]) -> fx.Node:
    """Return the layer whose output only `norm` uses.

    Raises:
        CannotFoldError: there is none.
    """
    path = [norm]
    node = input_of(norm)
    while node is not None and _passes(node, model, gone):
        _only_user(node, model)
        path.append(node)
        node = input_of(node)
    if node is None or not is_layer(node, model):
        what = "something that is not a tensor" if node is None else describe(node, model)
        raise CannotFoldError(f"its input comes from {what}, not from a linear or convolution layer")
    _only_user(node, model)
    _check_hooks([*path, node], model)
    return node


def layer_after(norm: fx.Node, model: nn.Module, gone: set[str]) -> fx.Node:
    """Return the layer that alone uses the output of `norm`.

    Raises:
        CannotFoldError: there is none, or the normalization's input changes before the layer gets it.
    """
    path = [norm]
    node = _only_user(norm, model)
    while _passes(node, model, gone):
        path.append(node)
        node = _only_user(node, model)
    if not is_layer(node, model) or input_of(node) is not path[-1] or node.all_input_nodes != [path[-1]]:
        raise CannotFoldError(f"its output goes to {describe(node, model)}, not to a linear or convolution layer")
    _check_hooks([*path, node], model)
    # With the normalization gone the layer gets the tensor itself, not a new one.
    source: fx.Node | None = input_of(norm)
    while source is not None:
        for user in source.users:
            if user not in path and mutates(user, model):
                raise CannotFoldError(
                    f"{describe(user, model)} may write into its input before the layer after it runs"
                )
        source = input_of(source) if _passes(source, model, gone) else None
    return node
