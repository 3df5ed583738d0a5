"""Population batch normalization: constants in training, refreshed from all samples of the batches in between."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchlab.nn as ours


def batches(count: int, seed: int = 0, features: int = 3) -> list[Tensor]:
    """Uneven batches whose means differ: averaging their variances would be wrong."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(int(torch.randint(1, 9, (), generator=generator)) + (k == 0), features, generator=generator) + 3 * k
        for k in range(count)
    ]


@pytest.mark.parametrize("refresh_every", [1, 3, 4])
@pytest.mark.parametrize("momentum", [1.0, 0.3])
def test_outputs_and_refreshes_are_those_of_a_slow_recomputation(refresh_every: int, momentum: float) -> None:
    layer = ours.PopulationBatchNorm1d(3, 1e-3, momentum, refresh_every=refresh_every).double()
    mean = var = np.zeros(3)
    seen: list[np.ndarray] = []
    since = 0
    for step, batch in enumerate(batches(13)):
        x = batch.double()
        if step == 0:
            mean, var = x.numpy().mean(0), x.numpy().var(0, ddof=1)
        torch.testing.assert_close(layer(x), torch.from_numpy((x.numpy() - mean) / np.sqrt(var + 1e-3)))
        seen.append(x.numpy())
        since += 1
        if since == refresh_every and len(np.concatenate(seen)) > 1:
            rows = np.concatenate(seen)
            mean = (1 - momentum) * mean + momentum * rows.mean(0)
            var = (1 - momentum) * var + momentum * rows.var(0, ddof=1)
            seen, since = [], 0
        elif since == refresh_every:
            since -= 1  # one sample has no variance: the collection goes on
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-10)
    assert layer.num_batches_tracked.item() == 13


def test_a_sample_does_not_know_its_batch() -> None:
    layer = ours.PopulationBatchNorm1d(3)
    first, x = torch.randn(8, 3), torch.randn(6, 3)
    layer(first)
    together = layer(x)
    alone = torch.cat([layer(row.unsqueeze(0)) for row in x])  # batches of one train
    assert torch.equal(together, alone)
    assert torch.equal(layer.eval()(x), together)


def test_no_gradient_goes_through_the_statistics() -> None:
    torch.manual_seed(1)
    layer = ours.PopulationBatchNorm1d(3, refresh_every=1).double()
    for _ in range(3):  # the first batch too, and across refreshes in the middle of a graph
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        g = torch.randn(5, 3, dtype=torch.float64)
        before = layer.running_var.clone()
        y = layer(x)
        used = x.detach().var(0) if layer.num_batches_tracked == 1 else before
        again = layer(x.detach())  # refreshes before the backward pass
        found = torch.autograd.grad(y, [x, layer.weight], g)
        torch.testing.assert_close(found[0], g / (used + 1e-5).sqrt())
        torch.testing.assert_close(found[1], (g * y.detach()).sum(0))
        assert again.shape == y.shape


def test_the_layer_in_front_can_undo_it_until_the_refresh() -> None:
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(2))
    layer, plain = ours.PopulationBatchNorm1d(2, refresh_every=3), nn.BatchNorm1d(2)
    expected = layer(x)
    torch.testing.assert_close(
        layer(10 * x), 10 * expected + 9 * layer.running_mean / (layer.running_var + 1e-5).sqrt()
    )
    torch.testing.assert_close(plain(10 * x), plain(x), rtol=1e-3, atol=1e-3)


def test_resumes_in_the_middle_of_a_collection() -> None:
    layer = ours.PopulationBatchNorm1d(3, refresh_every=4)
    data = batches(11, seed=3)
    for x in data[:6]:
        layer(x)
    resumed = ours.PopulationBatchNorm1d(3, refresh_every=4)
    resumed.load_state_dict(layer.state_dict(), strict=True)
    for x in data[6:]:
        assert torch.equal(layer(x), resumed(x))
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in layer.state_dict().items())


def test_a_checkpoint_of_torchs_layer_brings_statistics_and_an_empty_collection() -> None:
    stock = nn.Sequential(nn.BatchNorm1d(3))
    for seed in range(3):
        stock(3 * torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)) + 1)
    model = nn.Sequential(ours.PopulationBatchNorm1d(3, refresh_every=2))
    model(batches(1, seed=9)[0])
    given = stock.state_dict()
    keys = list(given)
    model.load_state_dict(given, strict=True)
    assert list(given) == keys
    x = torch.randn(4, 3)
    torch.testing.assert_close(model(x), copy.deepcopy(stock).eval()(x))  # not the first batch
    assert model[0].collected_batches.item() == 1
    model(x)
    torch.testing.assert_close(model[0].running_mean, x.mean(0))
    model(x)
    back = {key: value for key, value in model.state_dict().items() if "collected_" not in key}
    stock.load_state_dict(back, strict=True)
    torch.testing.assert_close(stock.eval()(x), model.eval()(x))
    incomplete = {key: value for key, value in model.state_dict().items() if "collected_m2" not in key}
    with pytest.raises(RuntimeError, match="collected_m2"):
        model.load_state_dict(incomplete, strict=True)


def test_batch_statistics_on_request_and_the_collection_goes_on() -> None:
    mine, plain = ours.PopulationBatchNorm1d(3, refresh_every=2), ours.BatchNorm1d(3)
    mine.statistics = "batch"
    x, more = torch.randn(6, 3), torch.randn(5, 3) + 2
    assert torch.equal(mine(x), plain(x))
    mine(more)
    torch.testing.assert_close(mine.running_var, torch.cat([x, more]).var(0))
    with pytest.raises(ValueError, match="one value per channel"):
        mine(x[:1])


def test_a_pause_stops_collection_and_refresh() -> None:
    layer = ours.PopulationBatchNorm1d(3, refresh_every=1)
    layer(torch.randn(6, 3))
    layer.update_statistics = False
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(100 * torch.randn(6, 3))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_nonfinite_batches() -> None:
    clean, hit = (ours.PopulationBatchNorm1d(3, refresh_every=3, nonfinite="skip") for _ in range(2))
    poisoned = torch.randn(4, 3)
    poisoned[0, 0] = math.inf
    hit(poisoned)  # as the first batch too
    assert hit.num_batches_tracked.item() == 0
    for step, x in enumerate(batches(7)):
        clean(x)
        hit(x)
        if step in (1, 2, 4):
            hit(poisoned)
    assert all(torch.equal(value, hit.state_dict()[key]) for key, value in clean.state_dict().items())
    strict = ours.PopulationBatchNorm1d(3, nonfinite="raise")
    before = {key: value.clone() for key, value in strict.state_dict().items()}
    with pytest.raises(ValueError, match=r"non-finite batch statistics in 1 of 3 channels \(0\)"):
        strict(poisoned)
    assert all(torch.equal(value, before[key]) for key, value in strict.state_dict().items())


def test_counts_do_not_stop_where_float32_has_no_next_integer() -> None:
    layer = ours.PopulationBatchNorm1d(1, refresh_every=10**6)
    layer(torch.randn(4, 1))
    layer.collected_count.fill_(2**24)
    layer(torch.randn(1, 1))
    assert layer.collected_count.item() == 2**24 + 1


def test_large_means_keep_the_digits_of_the_variance() -> None:
    generator = torch.Generator().manual_seed(4)
    data = [torch.randn(20, 2, generator=generator) + 1e3 for _ in range(10)]
    layer = ours.PopulationBatchNorm1d(2, refresh_every=10)
    for x in data:
        layer(x)
    torch.testing.assert_close(layer.running_var.double(), torch.cat(data).double().var(0), rtol=1e-5, atol=0)


def test_starting_over() -> None:
    layer, fresh = ours.PopulationBatchNorm1d(3), ours.PopulationBatchNorm1d(3)
    layer(torch.randn(6, 3))
    layer.reset_running_stats()
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"refresh_every": 2.5}, "refresh_every is 2.5"),
        ({"refresh_every": True}, "refresh_every is True"),
        ({"momentum": None}, "momentum is None"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"track_running_stats": False}, "track_running_stats=False"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.PopulationBatchNorm1d(3, **options)
