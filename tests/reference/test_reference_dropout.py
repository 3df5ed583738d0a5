"""The layers compute what the formulas say, with the noise that they drew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchlab import nn as ours
from batchlab import reference

X = torch.randn(6, 4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3


@pytest.mark.parametrize("share", [None, (2, 3), (0,), (1, 2, 3), (0, 2)])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_dropout(p: float, share: tuple[int, ...] | None) -> None:
    layer = ours.Dropout(p, share=share)
    torch.manual_seed(1)
    kept = layer(torch.ones_like(X)) != 0
    torch.manual_seed(1)
    torch.testing.assert_close(layer(X), reference.dropout.dropout(X, kept, p))
    for dimension in share or ():
        assert torch.equal(kept, kept.narrow(dimension, 0, 1).expand_as(kept))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_gaussian_dropout(p: float) -> None:
    torch.manual_seed(1)
    normal = torch.randn_like(X)
    torch.manual_seed(1)
    torch.testing.assert_close(ours.GaussianDropout(p)(X), reference.dropout.gaussian_dropout(X, normal, p))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_uniform_dropout(beta: float) -> None:
    torch.manual_seed(1)
    uniform = torch.rand_like(X)
    torch.manual_seed(1)
    torch.testing.assert_close(ours.UniformDropout(beta)(X), reference.dropout.uniform_dropout(X, uniform, beta))


@pytest.mark.parametrize("exact", [True, False])
def test_drop_path(exact: bool) -> None:
    branch = nn.Conv2d(4, 4, 1).double()
    layer = ours.DropPath(branch, 0.5, exact=exact)
    torch.manual_seed(1)
    with torch.no_grad():
        branch_of_all = branch(X)
        y = layer(X)
    kept = (y != X).flatten(1).any(1)
    scale = 6 / int(kept.sum()) if exact else 2.0
    expected = reference.dropout.drop_path(X, lambda _: branch_of_all, kept, scale)
    torch.testing.assert_close(y, expected)
    assert kept.any()


@pytest.mark.parametrize("momentum", [1.0, 0.3])
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_population_batch_norm(refresh_every: int, momentum: float) -> None:
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(n, 4, 3, 3, generator=generator) * n + n for n in (5, 2, 9, 4, 4, 7, 3)]
    layer = ours.PopulationBatchNorm2d(4, refresh_every=refresh_every, momentum=momentum)
    outputs, mean, var = reference.population_batch_norm.population_batch_norm(batches, refresh_every, momentum)
    torch.testing.assert_close([layer(x).detach() for x in batches], outputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close([layer.running_mean, layer.running_var], [mean, var], rtol=1e-4, atol=1e-4)
