"""Batches in parts, one for each rank, and what batch norm of the whole is: one process, float64, plain formulas."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.batch_norm_tables import ACTIVATIONS


@dataclass(frozen=True)
class Problem:
    parts: tuple[int, ...] = (5, 2)
    tail: tuple[int, ...] = (3, 3)
    mean: float = 0.0
    dtype: torch.dtype = torch.float64
    activation: str | None = None
    residual: bool = False
    layout: str = "contiguous"
    backends: tuple[str, ...] = ("auto", "auto", "auto")  # "none": no kernel could be compiled there
    masked: tuple[int, ...] = ()  # ranks that give a mask
    weights: str = "same"


CHANNELS = 5
EPS = 1e-3
PROBLEMS = {
    "plain": Problem(),
    "relu": Problem(activation="relu"),
    "leaky": Problem(activation="leaky_relu", residual=True, layout="channels_last"),
    "silu": Problem(activation="silu", layout="channels_last"),
    "sigmoid": Problem(activation="sigmoid", residual=True),
    "relu-residual": Problem(activation="relu", residual=True),
    "silu-residual": Problem(activation="silu", residual=True, layout="strided"),
    "residual": Problem(residual=True, layout="channels_last"),
    "two-dimensional": Problem(parts=(40, 9), tail=(), activation="relu"),
    "far": Problem(mean=1e3, activation="silu"),
    "far-float32": Problem(mean=3e4, dtype=torch.float32, residual=True),
    "float32": Problem(parts=(7, 4), dtype=torch.float32, activation="silu", layout="channels_last"),
    "bfloat16": Problem(parts=(7, 4), dtype=torch.bfloat16, activation="relu", residual=True, layout="channels_last"),
    "float16": Problem(dtype=torch.float16, activation="silu", mean=5.0),
    "mixed": Problem(activation="relu", residual=True, backends=("auto", "reference"), layout="channels_last"),
    "mixed-relu": Problem(activation="relu", backends=("reference", "auto")),
    "mixed-float32": Problem(mean=3e4, dtype=torch.float32, activation="silu", backends=("reference", "auto")),
    "mixed-silu": Problem(activation="silu", residual=True, backends=("reference", "auto"), mean=1e3),
    "no-kernel": Problem(activation="sigmoid", residual=True, backends=("none", "auto")),
    "empty": Problem(parts=(0, 7), activation="relu", residual=True),
    "empty-fused": Problem(parts=(6, 0), activation="silu", backends=("fused", "fused")),
    "all-empty": Problem(parts=(0, 0)),
    "one-each": Problem(parts=(1, 1), tail=(), dtype=torch.float64),
    "one-masked": Problem(activation="silu", residual=True, masked=(1,)),
    "other-weights": Problem(activation="silu", weights="different"),
    "zero-weights": Problem(residual=True, weights="zero here and there", dtype=torch.float32),
    "three": Problem(parts=(4, 0, 3), activation="relu", residual=True, backends=("auto", "auto", "none")),
    "three-far": Problem(parts=(2, 5, 3), mean=-1e3, activation="silu", layout="channels_last"),
    "three-masked": Problem(
        parts=(3, 2, 2), activation="leaky_relu", backends=("auto", "reference", "auto"), masked=(1,)
    ),
}
HIGHER = (
    "mixed-relu",
    "plain",
    "silu",
    "mixed",
    "mixed-silu",
    "sigmoid",
    "no-kernel",
    "empty",
    "one-masked",
    "other-weights",
    "three",
)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return torch.stack([x, x], -1)[..., 0] if layout == "strided" else x.clone()


def tensors(problem: Problem) -> dict[str, list[Any]]:
    """What each rank is given."""
    generator = torch.Generator().manual_seed(3)
    shape = (sum(problem.parts), CHANNELS, *problem.tail)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    world = len(problem.parts)
    # Every sample brings an offset of its own: the ranks' means differ.
    x = (normal(*shape) + normal(shape[0], CHANNELS, *[1] * len(problem.tail)) + problem.mean).to(problem.dtype)
    parts = {"g": normal(*shape) + 0.5, "residual": normal(*shape)}
    found = {name: list(part.to(problem.dtype).split(list(problem.parts))) for name, part in parts.items()}
    masks = torch.rand(shape[0], 1, *problem.tail, generator=generator) < 0.7
    found["x"] = list(x.split(list(problem.parts)))
    found["mask"] = [
        mask if rank in problem.masked else torch.ones_like(mask)
        for rank, mask in enumerate(masks.split(list(problem.parts)))
    ]
    parameters = torch.float64 if problem.dtype == torch.float64 else torch.float32
    weights = (normal(world, CHANNELS) if problem.weights != "same" else normal(1, CHANNELS).expand(world, -1)).clone()
    if problem.weights == "zero here and there":
        weights[0, :2] = 0
        weights[1, 1:3] = 0
    found["weight"] = list(weights.to(parameters))
    found["bias"] = list(normal(1, CHANNELS).expand(world, -1).to(parameters))
    return found


def leaves(problem: Problem, rank: int) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    given = {name: values[rank].clone() for name, values in tensors(problem).items()}
    g, mask = given.pop("g"), given.pop("mask")
    for name in ("x", "residual"):
        given[name] = laid_out(given[name], problem.layout)
    if not problem.residual:
        del given["residual"]
    for value in given.values():
        value.requires_grad_()
    return given, g, mask if rank in problem.masked else None


def exact(problem: Problem, higher: bool = False) -> dict[str, Any]:
    """One process, float64, plain formulas; each rank's weights are leaves of their own, and so are all inputs."""
    given = [leaves(problem, rank)[0] for rank in range(len(problem.parts))]
    given = [{name: v.detach().double().requires_grad_() for name, v in rank.items()} for rank in given]
    parts, ndim = tensors(problem), 2 + len(problem.tail)
    dims = [0, *range(2, ndim)]
    x = torch.cat([rank["x"] for rank in given])
    masks = torch.cat(parts["mask"]).expand_as(x[:, :1])
    count = int(masks.sum())
    mean = torch.where(masks, x, 0).sum(dims, keepdim=True) / max(count, 1)
    squares = torch.where(masks, (x - mean) ** 2, 0).sum(dims, keepdim=True)
    normalized = ((x - mean) / (squares / max(count, 1) + EPS).sqrt()).split(list(problem.parts))
    ys = []
    for rank, (value, mask) in enumerate(zip(normalized, parts["mask"], strict=True)):
        weight, bias = (given[rank][name].view(-1, *[1] * (ndim - 2)) for name in ("weight", "bias"))
        y = value * weight + bias
        y = y + given[rank]["residual"] if problem.residual else y
        ys.append(torch.where(mask, ACTIVATIONS[problem.activation](y), 0))
    gs = [g.double() for g in parts["g"]]
    found: dict[str, Any] = {"y": ys}
    names = list(given[0])
    if higher:
        flat = [rank[name] for rank in given for name in names]
        total = sum(((y * g).sum() for y, g in zip(ys, gs, strict=True)), torch.zeros(()))
        first = torch.autograd.grad(total, flat, create_graph=True)
        penalty = sum((value.square().sum() for value in first), torch.zeros(()))
        inputs = [rank["x"] for rank in given]
        second = torch.autograd.grad(penalty, inputs, create_graph=True)
        total = sum(((y * y).sum() for y in ys), penalty) + sum(value.square().sum() for value in second)
        total.backward()
    else:
        torch.autograd.backward(ys, gs)
        unbiased = squares.flatten() / max(count - 1, 1)
        running = torch.stack([0.25 * mean.flatten(), 0.75 + 0.25 * unbiased])
        untouched = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, CHANNELS)
        found["running"] = (running if count > 1 else untouched).detach()
        found["batches"] = torch.tensor(int(count > 1))
    return found | {name: [rank[name].grad for rank in given] for name in names}
