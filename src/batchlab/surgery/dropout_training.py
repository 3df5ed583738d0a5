"""One training step of a copy of a model with batchwise dropout: what it puts out, and all of its gradients."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from batchlab.nn import SubmatrixSequential
from batchlab.surgery.copies import copy_model, copy_to_run, preserved_random_state
from batchlab.surgery.dropout_calls import cloned
from batchlab.surgery.example import Example, map_tensors
from batchlab.surgery.verify import tensors_in

__all__ = ["TrainingStep", "perturbed", "train_once"]

ULPS: Final = 4


class TrainingStep(NamedTuple):
    """What one forward and backward gave.

    Attributes:
        outputs: of the forward.
        gradients: of all parameters and inputs, as one vector: one that is zero but for rounding has no scale of its
            own, only that of all.
        buffers: afterwards, as one vector.
    """

    outputs: Any
    gradients: Tensor
    buffers: Tensor


def _together(tensors: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.float64), *(t.detach().flatten().cpu().double() for t in tensors)])


def _in_graph(value: Any, leaves: list[Tensor]) -> Any:
    """The arguments, floating tensors made from leaves: their gradients are seen, and a model may write to them."""

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()

    return map_tensors(leaf, value)


def train_once(model: nn.Module, example: Example, mode: str | None) -> TrainingStep:
    """Run a copy forward and backward, in training mode; the gradients at the outputs are random, but fixed.

    The random state is the same at every call, and so are the patterns.

    Args:
        model: a converted one, with dropouts that draw from torch's default generator; it stays as it is.
        example: the arguments.
        mode: of the SubmatrixSequentials; None makes them plain ones, whose dropouts mask.
    """
    net = copy_to_run(model).train()
    for module in net.modules():
        if isinstance(module, SubmatrixSequential):
            if mode is None:
                module.__class__ = nn.Sequential  # type: ignore[assignment]
            else:
                module.mode = mode
    leaves: list[Tensor] = []
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    try:
        with preserved_random_state(model), torch.enable_grad():
            outputs = net(*_in_graph(example.args, leaves), **_in_graph(example.kwargs, leaves))
            ends = [t for t in tensors_in(outputs) if t.requires_grad]
            generator = torch.Generator().manual_seed(0)
            seeds = [torch.randn(t.shape, dtype=t.dtype, generator=generator).to(t.device) for t in ends]
            torch.autograd.backward(ends, seeds)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in [*parameters, *leaves]]
    finally:
        for parameter in parameters:  # which the copies share
            parameter.grad = None
    return TrainingStep(outputs, _together(gradients), _together(list(net.buffers())))


@torch.no_grad()
def perturbed(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Copies in which every number is a few units in the last place off, as if it had been rounded otherwise."""
    generator = torch.Generator().manual_seed(0)

    def nudge(t: Tensor) -> None:
        off = torch.empty(t.shape, dtype=torch.float64).uniform_(-ULPS, ULPS, generator=generator)
        t.mul_((1 + off * torch.finfo(t.dtype).eps).to(t))

    moved, other = copy_model(model), Example(cloned(example.args), cloned(example.kwargs))
    for tensor in [*moved.parameters(), *tensors_in(list(other))]:
        if tensor.is_floating_point():
            nudge(tensor)
    return moved, other
