"""Sums over paths against a list of all paths."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from batchlab.reference import path_norm

SIZES = [(3, 2), (1, 1), (2, 3, 2), (3, 1, 4), (2, 3, 2, 3), (2, 2, 3, 2, 2)]


def network(sizes: tuple[int, ...], biased: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(sum(sizes))
    weights = [torch.randn(m, n, dtype=torch.float64, generator=generator) for n, m in itertools.pairwise(sizes)]
    biases: list[Tensor | None] = [
        torch.randn(m, dtype=torch.float64, generator=generator) if biased else None for m in sizes[1:]
    ]
    return weights, biases


def all_paths(sizes: tuple[int, ...], biased: bool) -> list[list[tuple[str, int, tuple[int, ...]]]]:
    """Every path as its edges: (kind, layer, index)."""
    paths = []
    for start in range(len(sizes)):
        if start and not biased:
            break
        for units in itertools.product(*(range(size) for size in sizes[start:])):
            edges = [("weight", start + step, (units[step + 1], units[step])) for step in range(len(units) - 1)]
            paths.append(([("bias", start - 1, (units[0],))] if start else []) + edges)
    return paths


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_are_those_over_all_paths(sizes: tuple[int, ...], biased: bool) -> None:
    weights, biases = network(sizes, biased)

    def value(edge: tuple[str, int, tuple[int, ...]]) -> float:
        kind, layer, index = edge
        tensor = weights[layer] if kind == "weight" else biases[layer]
        assert tensor is not None
        return float(tensor[index])

    paths = all_paths(sizes, biased)
    total = sum(math.prod(value(edge) ** 2 for edge in path) for path in paths)
    torch.testing.assert_close(path_norm.path_norm(weights, biases).item(), math.sqrt(total))
    of_weights, of_biases = path_norm.kappas(weights, biases)
    for kind, found in (("weight", of_weights), ("bias", of_biases)):
        for layer, kappa in enumerate(found):
            if kappa is None:
                continue
            for index in itertools.product(*(range(size) for size in kappa.shape)):
                me = (kind, layer, index)
                others = [[e for e in path if e != me] for path in paths if me in path]
                expected = float(sum(math.prod(value(e) ** 2 for e in path) for path in others))
                torch.testing.assert_close(kappa[index].item(), expected)


def test_kappa_is_half_the_second_derivative_of_the_squared_norm() -> None:
    weights, biases = network((2, 3, 2), True)
    for layer in range(2):
        for index in itertools.product(range(weights[layer].shape[0]), range(weights[layer].shape[1])):

            def squared(value: Tensor, layer: int = layer, index: tuple[int, ...] = index) -> Tensor:
                changed = [weight.clone() for weight in weights]
                changed[layer][index] = value
                return path_norm.path_norm(changed, biases).square()

            second = torch.autograd.functional.hessian(squared, weights[layer][index])
            torch.testing.assert_close(path_norm.kappas(weights, biases)[0][layer][index], second / 2)


def test_an_edge_without_paths_rests() -> None:
    weight, kappa = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.5])
    assert path_norm.step(weight, torch.tensor([0.0, 1.0]), kappa, 0.25).tolist() == [1.0, 1.5]
