"""How far one step shifts what a layer gets, and how the loss behaves along its gradient (Santurkar et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.lab.training import paused_updates

__all__ = ["MULTIPLES", "along_gradient", "covariate_shift", "landscape"]

MULTIPLES: Final = tuple(2 ** (power / 2) for power in range(-2, 5))
"""From a half to four times the gradient step, as in the paper."""

Loss = Callable[[nn.Module], Tensor]


@contextmanager
def _put_back() -> Iterator[Tensor]:
    """The state of torch's random numbers, which the body may change."""
    with torch.random.fork_rng(devices=[]):
        yield torch.get_rng_state()


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _norm(values: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))


def _cosine(a: Tensor, b: Tensor) -> float:
    length = _norm([a]) * _norm([b])
    return float((a.double() * b.double()).sum()) / length if length else math.nan


@torch.no_grad()
def _inputs(network: nn.Module, layers: Sequence[nn.Module], loss: Loss) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance over the batch of each input feature of each layer."""
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0].double().transpose(0, 1).flatten(1)
        found[module] = features.mean(1), features.var(1, correction=0)

    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        loss(network)
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in layers]


def covariate_shift(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss) -> dict[str, Any]:
    """How far the optimizer's next step shifts the gradient and the inputs of each layer but the first.

    shift_i  = ||G_i - G'_i||_2,   cosine_i = <G_i, G'_i> / (||G_i|| ||G'_i||)
    moved_i  = √( Σ_u (m'_u - m_u)² / Σ_u v_u )

    G_i is the gradient of the loss for the weight of layer i; G'_i the same with all parameters in front of layer i as
    the step leaves them, and its own and later ones as they are. m_u and v_u are the batch's mean and variance of the
    layer's input feature u, m'_u its mean after the step. The same loss, so the same batch, before and after.

    Measured on copies, in training mode with running statistics at rest; network, optimizer and random numbers are
    left as they are. Both sides of a comparison draw the same random numbers. If the network draws any, "anew" holds
    the same measures with those of the next step on the changed side.

    Args:
        network: whose linear and convolution layers are looked at, in the order of their parameters.
        optimizer: of the network's parameters; its state (momentum) has a part in the step.
        loss: of a network.

    Returns:
        lists with a number for each layer: "gradient" (||G_i||), "shift", "cosine" and "moved".

    Source: Santurkar, Tsipras, Ilyas & Madry 2018 (arXiv 1805.11604), definition 2.1; `moved` after the wording of
    Ioffe & Szegedy 2015, section 2.

    >>> network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> for parameter, value in zip(network.parameters(), (1.0, 3.0)): nn.init.constant_(parameter, value) and None
    >>> loss = lambda net: net(torch.ones(1, 1)).sum()             # w1 w2, whose gradient for w2 is w1
    >>> covariate_shift(network, torch.optim.SGD(network.parameters(), lr=0.1), loss)["shift"]    # w1 - 0.1 w2
    [0.3...]
    """
    with _put_back() as here:
        network, optimizer = deepcopy((network, optimizer))
        network.train()
        with paused_updates(network):
            return _shift_of(network, optimizer, loss, here)


def _shift_of(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, here: Tensor) -> dict[str, Any]:
    """What `covariate_shift` returns; the arguments are changed."""
    parameters = list(network.parameters())
    layers = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][1:]
    places = [next(i for i, p in enumerate(parameters) if p is layer.weight) for layer in layers]
    before = _copies(parameters)
    inputs = _inputs(network, layers, loss)
    torch.set_rng_state(here)
    optimizer.zero_grad()
    loss(network).backward()
    following = torch.get_rng_state()
    gradients = _copies([layer.weight.grad for layer in layers if layer.weight.grad is not None])
    optimizer.step()
    after = _copies(parameters)

    def compare(state: Tensor) -> dict[str, list[float]]:
        _assign(parameters, before)
        shift, cosine = [], []
        for layer, place, gradient in zip(layers, places, gradients, strict=True):
            _assign(parameters[:place], after[:place])
            torch.set_rng_state(state)
            (other,) = torch.autograd.grad(loss(network), [layer.weight])
            shift.append(_norm([other - gradient]))
            cosine.append(_cosine(other, gradient))
        _assign(parameters, after)
        torch.set_rng_state(state)
        moved = [
            float(((mean - old).square().sum() / variance.sum()).sqrt())
            for (mean, _), (old, variance) in zip(_inputs(network, layers, loss), inputs, strict=True)
        ]
        return {"shift": shift, "cosine": cosine, "moved": moved}

    found: dict[str, Any] = {"gradient": [_norm([gradient]) for gradient in gradients], **compare(here)}
    if not torch.equal(here, following):
        found["anew"] = compare(following)
    return found


def along_gradient(
    network: nn.Module, loss: Loss, rate: float, multiples: Sequence[float] = MULTIPLES
) -> dict[str, Any]:
    """How loss and gradient change along the gradient step.

    losses_k = L(θ - η_k g),   changes_k = ||∇L(θ) - ∇L(θ - η_k g)||_2,   η_k = multiples_k · rate
    smoothness = max_k changes_k / (η_k ||g||)

    g = ∇L(θ) for all parameters. The smoothness is the paper's "effective" β. Measured on a copy, in training mode with
    running statistics at rest, and with the same random numbers everywhere: noise does not make a landscape rough.

    Args:
        network: at θ; left as it is.
        loss: of a network, so of one batch.
        rate: learning rate of the gradient step.
        multiples: of it.

    Returns:
        "loss", "norm" (||g||), "losses", "changes" and "smoothness".

    Source: Santurkar, Tsipras, Ilyas & Madry 2018 (arXiv 1805.11604), section 3.2.

    >>> network = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(network.weight, 2.0)
    >>> along_gradient(network, lambda net: 1.5 * net(torch.ones(1, 1)).square().sum(), rate=0.1)["smoothness"]
    3.0...
    """
    with _put_back() as here:
        network = deepcopy(network).train()
        parameters = list(network.parameters())
        origin = _copies(parameters)

        def look() -> tuple[float, tuple[Tensor, ...]]:
            torch.set_rng_state(here)
            value = loss(network)
            return float(value.detach()), torch.autograd.grad(value, parameters)

        with paused_updates(network):
            value, gradient = look()
            norm = _norm(gradient)
            losses, changes = [], []
            for multiple in multiples:
                step = multiple * rate
                _assign(parameters, [o - step * g for o, g in zip(origin, gradient, strict=True)])
                there, other = look()
                losses.append(there)
                changes.append(_norm([a - b for a, b in zip(other, gradient, strict=True)]))
    curvatures = [c / (m * rate * norm) if norm else math.nan for c, m in zip(changes, multiples, strict=True)]
    smoothness = max(curvatures) if all(map(math.isfinite, curvatures)) else math.nan
    return {"loss": value, "norm": norm, "losses": losses, "changes": changes, "smoothness": smoothness}


def _plain(value: Any) -> Any:
    """Six digits for a record; None for what is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if math.isfinite(value) else None


def landscape(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, rate: float
) -> dict[str, Any]:
    """Both measures on one batch, with cross-entropy as loss, ready for a record.

    Args:
        network: left as it is, like the optimizer and random numbers.
        optimizer: of the network; its next step is taken with `rate`.
        images: the coming batch.
        labels: of the images.
        rate: learning rate of the next step.

    Returns:
        "shift": what `covariate_shift` returns; "along": what `along_gradient` returns; numbers have six digits.
    """
    loss = partial(_cross_entropy, images=images, labels=labels)
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = rate
        found = {"shift": covariate_shift(network, optimizer, loss), "along": along_gradient(network, loss, rate)}
    finally:
        for group, value in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = value
    plain: dict[str, Any] = _plain(found)
    return plain


def _cross_entropy(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images), labels)
