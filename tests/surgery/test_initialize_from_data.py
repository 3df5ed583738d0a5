"""`initialize_from_data`: every layer on what the layers before it return, and nothing else changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchlab.nn
from batchlab.nn import FactoredConv2d, FactoredLinear
from batchlab.surgery import initialize_from_data, to_factored


def network() -> nn.Sequential:
    return nn.Sequential(
        FactoredConv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Dropout(0.5),
        FactoredConv2d(8, 6, 3, factorization="weight_standardization"),
        nn.Tanh(),
        nn.Flatten(),
        FactoredLinear(6 * 36, 5, factorization="centered_weight_norm"),
    )


def images() -> Tensor:
    return torch.randn(20, 3, 8, 8) * 4 + 7


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What each factored layer returns with dropout off and batch norm on the batch, in a copy."""
    model, seen = copy.deepcopy(model).eval(), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
        if isinstance(module, (FactoredConv2d, FactoredLinear)):
            module.register_forward_hook(lambda _m, _a, y: seen.append(y.detach()))
    with torch.no_grad():
        model(x)
    return seen


@pytest.mark.usefixtures("quiet")
def test_all_layers_in_one_pass_and_nothing_else() -> None:
    model, x = network(), images()
    model[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[arg-type]
    assert initialize_from_data(model, x) is model
    handle.remove()
    assert calls == [1]
    for y in outputs_of(model, x):
        rows = y.transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows)).double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(rows.std(1, correction=0), torch.ones(len(rows)).double(), rtol=1e-4, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{i}.{name}" for i in (0, 4, 7) for name in ("g", "bias")}
    assert all(p.grad is None for p in model.parameters())


def test_constant_units_leave_the_whole_model_as_it_was() -> None:
    model, x = network(), images()
    with torch.no_grad():
        model[4].v[2] = 0  # found after layer 0 was started
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layer '4' cannot be started .* \(units 2\)"):
        initialize_from_data(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        model[4].v[2] = 1 + torch.arange(72).view(8, 3, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # an error of the model's own, at its end
        initialize_from_data(model, x[:, :, :6])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = FactoredLinear(4, 4), FactoredLinear(4, 4)
        self.bounded = FactoredLinear(4, 2, factorization="spectral_norm")

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.bounded(self.twice(torch.relu(self.twice(input=x * scale))))


def test_layers_that_are_called_twice_or_never_and_spectral_norm() -> None:
    model, x = Branches(), torch.randn(30, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="'never', 'bounded'"):
        initialize_from_data(model, {"x": x, "scale": 3.0})
    y = model.twice(x * 3.0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(4), rtol=1e-4, atol=0)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"twice.g", "twice.bias"}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="convert it by to_factored first"):
        initialize_from_data(nn.Linear(3, 2), torch.randn(5, 3))
    with pytest.raises(ValueError, match="one gain for all"):
        initialize_from_data(FactoredLinear(3, 2, factorization="spectral_norm"), torch.randn(5, 3))
    first, second = FactoredLinear(3, 3), FactoredLinear(3, 3)
    second.bias = first.bias
    with pytest.raises(ValueError, match="layer '0' shares its gain or bias"):
        initialize_from_data(nn.Sequential(first, second), torch.randn(5, 3))

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = FactoredLinear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="reached none"):
        initialize_from_data(Unused(), torch.randn(5, 3))


def test_a_converted_model_trains_from_there() -> None:
    model = to_factored(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3)))
    x, target = torch.randn(200, 10) * 5 + 20, torch.randint(0, 3, (200,))
    initialize_from_data(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("kind", ["BatchNorm1d", "MeanOnlyBatchNorm1d", "VarianceOnlyBatchNorm1d", "Whitening1d"])
def test_a_normalization_behind_a_layer_takes_the_statistics_of_this_batch(kind: str) -> None:
    normalization = getattr(batchlab.nn, kind)(16)
    model = nn.Sequential(FactoredLinear(12, 16, bias=False), normalization, nn.ReLU(), FactoredLinear(16, 5))
    before = copy.deepcopy(normalization.state_dict())
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(1)) * 3 + 5
    initialize_from_data(model, x)
    assert all(torch.equal(before[key], value) for key, value in normalization.state_dict().items())
    y = model.train()(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(5), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:to_factored left")
def test_a_transformer_with_padding_is_started() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    to_factored(model)
    padding = torch.tensor([[False, False, True]] * 50)
    initialize_from_data(model, {"src": torch.randn(50, 3, 8), "src_key_padding_mask": padding})
    assert torch.backends.mha.get_fastpath_enabled()
