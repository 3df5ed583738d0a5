"""The loop's parts, each against the same thing done slowly by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.lab.mechanisms import ACTIVATIONS
from batchlab.lab.networks import MLP
from batchlab.lab.optimizers import make_optimizer
from batchlab.lab.settings import NetworkSettings, OptimizerSettings, SettingsError
from batchlab.lab.training import (
    activation_percentiles,
    batch_order,
    evaluate,
    evaluation_steps,
    learning_rate,
    prepare_images,
    train,
)


def test_pixels_become_binary_or_shares() -> None:
    pixels = torch.tensor([[[0, 127, 128, 255]]], dtype=torch.uint8)
    assert prepare_images(pixels, True).tolist() == [[[0, 0, 1, 1]]]
    assert prepare_images(pixels, False).flatten().tolist() == pytest.approx([0, 127 / 255, 128 / 255, 1])


def test_every_epoch_shows_every_image_once_in_a_new_order() -> None:
    steps = list(batch_order(20, 4, 7, 0, 15))
    epochs = [torch.cat(steps[start : start + 5]).tolist() for start in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert torch.cat(list(batch_order(20, 4, 8, 0, 5))).tolist() != epochs[0]


def test_the_order_can_be_taken_up_anywhere() -> None:
    whole = list(batch_order(23, 4, 3, 0, 17))
    for cut in (1, 5, 6, 16):
        parts = [*batch_order(23, 4, 3, 0, cut), *batch_order(23, 4, 3, cut, 17)]
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_too_few_images_for_a_batch() -> None:
    with pytest.raises(ValueError, match="batch_size is 60, but there are only 59"):
        next(batch_order(59, 60, 0, 0, 1))


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 1000, 50_000])
@pytest.mark.parametrize("spacing", [0.05, 1.0])
def test_evaluations_cover_the_run(steps: int, spacing: float) -> None:
    points = evaluation_steps(steps, spacing)
    assert points[0] == 0
    assert points[-1] == steps
    assert all(0 < b - a <= max(10, spacing * a + 5) for a, b in itertools.pairwise(points))


def test_schedules() -> None:
    rates = {
        name: [learning_rate(OptimizerSettings(2.0, schedule=name, final=0.25), step, 5) for step in range(5)]
        for name in ("constant", "linear", "cosine", "exponential")
    }
    assert rates["constant"] == [2] * 5
    assert rates["linear"] == pytest.approx([2, 1.625, 1.25, 0.875, 0.5])
    assert rates["exponential"] == pytest.approx([2, 2 / 2**0.5, 1, 1 / 2**0.5, 0.5])
    assert rates["cosine"] == pytest.approx([2 * (0.25 + 0.375 * (1 + math.cos(math.pi * k / 4))) for k in range(5)])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_steps_are_those_of_momentum_sgd_by_hand(schedule: str) -> None:
    torch.manual_seed(0)
    settings = OptimizerSettings(0.3, 0.8, weight_decay=0.01, schedule=schedule, final=0.5)
    network = MLP(4, 3, NetworkSettings((5,), "tanh")).double()
    images, labels = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
    slow = [p.detach().clone().requires_grad_() for p in network.parameters()]
    velocity = [torch.zeros_like(p) for p in slow]
    losses = []
    for step, index in enumerate(batch_order(12, 4, 1, 0, 6)):
        w1, b1, w2, b2 = slow
        logits = (images[index] @ w1.T + b1).tanh() @ w2.T + b2
        loss = -(logits - logits.logsumexp(1, keepdim=True))[torch.arange(4), labels[index]].mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, slow)
        rate = learning_rate(settings, step, 6)
        for k, (p, g) in enumerate(zip(slow, gradients, strict=True)):
            velocity[k] = 0.8 * velocity[k] + g + 0.01 * p.detach()
            slow[k] = (p.detach() - rate * velocity[k]).requires_grad_()
    mean = train(
        network, make_optimizer(network, settings, images), settings, images, labels, batch_order(12, 4, 1, 0, 6), 0, 6
    )
    for found, expected in zip(network.parameters(), slow, strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-10, atol=1e-12)
    assert mean == pytest.approx(np.mean(losses), rel=1e-6)


def test_evaluation_counts_right_answers() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))
    nn.init.eye_(network[1].weight)
    images = torch.eye(3).repeat(5, 1).view(15, 1, 3)
    labels = torch.tensor([0, 1, 2] * 4 + [1, 2, 0])
    loss, accuracy = evaluate(network, images, labels, chunk=4)
    assert accuracy == 12 / 15
    assert loss == pytest.approx(math.log(math.e + 2) - 12 / 15)


@pytest.mark.parametrize("normalization", ["none", "batch_norm"])
def test_percentiles_are_those_of_the_training_network_and_leave_it_alone(normalization: str) -> None:
    torch.manual_seed(0)
    network = MLP(6, 3, NetworkSettings((8, 4), normalization=normalization, weight_std=1.0))
    images = torch.randn(50, 6)
    network.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = activation_percentiles(network, images, 10, 3)
    assert not network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())

    rows = []
    for part in images.split(10):
        h = part.double()
        for layer in ("1", "2"):
            linear = network.get_submodule(f"linear{layer}")
            h = h @ linear.weight.double().T + (0 if linear.bias is None else linear.bias.double())
            if normalization == "batch_norm":
                h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
            if layer == "1":
                h = torch.sigmoid(h)
        rows.append(h)
    expected = np.percentile(torch.cat(rows).detach().numpy()[:, :3], [15, 50, 85], axis=0).T
    assert np.allclose(found, expected, atol=2e-5)


def test_arms_share_their_first_weights() -> None:
    weights = []
    for normalization in ("none", "batch_norm"):
        torch.manual_seed(5)
        network = MLP(10, 4, NetworkSettings((7, 6), normalization=normalization, weight_std=0.2))
        weights.append([m.weight.detach() for m in network.modules() if isinstance(m, nn.Linear)])
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)
    assert torch.cat([w.flatten() for w in weights[0]]).std().item() == pytest.approx(0.2, rel=0.15)


def test_networks_name_what_there_is() -> None:
    for name in ACTIVATIONS:
        assert MLP(4, 2, NetworkSettings((3,), activation=name))(torch.zeros(5, 4)).shape == (5, 2)
    with pytest.raises(SettingsError, match=r"network\.activation is 'step'; allowed: 'sigmoid'"):
        MLP(4, 2, NetworkSettings((3,), activation="step"))
    with pytest.raises(SettingsError, match=r"network\.normalization is 'layer'; allowed: 'none', 'batch_norm'"):
        MLP(4, 2, NetworkSettings((3,), normalization="layer"))
