"""Path norm and Path-SGD of a plain ReLU network, as sums over its layers (Neyshabur, Salakhutdinov & Srebro 2015).

    γ_in(v)  = Σ_u γ_in(u) w_uv² + b_v²,   1 at every input        (paths that end at unit v)
    γ_out(u) = Σ_v w_uv² γ_out(v),         1 at every output       (paths that start at unit u)
    κ(u→v)   = γ_in(u) γ_out(v),           κ(b_v) = γ_out(v)       (paths through an edge, without the edge itself)
    J        = Σ over paths of Π w²  =  Σ over outputs of γ_in;    the path norm is √J

A bias is an edge from a unit that is always 1, so a path may start there. No path crosses an edge twice, so J is affine
in s = w² of any one edge, and κ = ∂J/∂s = ½ ∂²J/∂w²; the second form is the paper's definition (section 4, for p = 2).

Weights are as in `torch.nn.Linear`, (outputs, inputs), in the order of the layers; a bias may be None.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["incoming", "kappas", "outgoing", "path_norm", "step"]


def incoming(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """γ_in of the units: one (units,) per layer, the inputs first.

    >>> incoming([torch.tensor([[2.0, 1.0]])], [torch.tensor([3.0])])
    [tensor([1., 1.]), tensor([14.])]
    """
    sums = [torch.ones_like(weights[0][0])]
    for weight, bias in zip(weights, biases, strict=True):
        total = torch.zeros_like(weight[:, 0])
        for unit in range(weight.shape[0]):
            total[unit] = (sums[-1] * weight[unit].square()).sum() + (0 if bias is None else bias[unit].square())
        sums.append(total)
    return sums


def outgoing(weights: Sequence[Tensor]) -> list[Tensor]:
    """γ_out of the units: one (units,) per layer, the inputs first.

    >>> outgoing([torch.tensor([[2.0, 1.0]])])
    [tensor([4., 1.]), tensor([1.])]
    """
    sums = [torch.ones_like(weights[-1][:, 0])]
    for weight in reversed(weights):
        total = torch.zeros_like(weight[0])
        for unit in range(weight.shape[1]):
            total[unit] = (sums[0] * weight[:, unit].square()).sum()
        sums.insert(0, total)
    return sums


def path_norm(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """√ of the sum over all paths, from an input or a bias to an output, of the product of squared weights.

    >>> path_norm([torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0]])], [None, torch.tensor([2.0])])
    tensor(7.)
    """
    return incoming(weights, biases)[-1].sum().sqrt()


def kappas(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
    """κ of every weight and of every bias, shaped as these.

    >>> kappas([torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0]])], [None, torch.tensor([2.0])])
    ([tensor([[9., 9.]]), tensor([[5.]])], [None, tensor([1.])])
    """
    into, out = incoming(weights, biases), outgoing(weights)
    of_weights = [torch.outer(out[layer + 1], into[layer]) for layer in range(len(weights))]
    of_biases = [None if bias is None else out[layer + 1].clone() for layer, bias in enumerate(biases)]
    return of_weights, of_biases


def step(weight: Tensor, gradient: Tensor, kappa: Tensor, lr: float) -> Tensor:
    """Return the weight after one step: w - lr · g / κ; entries with κ = 0 stay as they are.

    Where κ is 0 every path through the edge has another weight that is 0, so the network's output does not depend on
    the edge and its gradient is 0.

    >>> w, g, kappa = torch.tensor([1.0, 1.0]), torch.tensor([4.0, 0.0]), torch.tensor([8.0, 0.0])
    >>> step(w, g, kappa, lr=1.0)
    tensor([0.5000, 1.0000])
    """
    return weight - lr * torch.where(kappa > 0, gradient / kappa, 0)
