"""`to_natural` and `merge_natural`: the same function, the same objects, there and back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from batchlab.nn import FactoredLinear, NaturalLinear
from batchlab.optim import NaturalRefresh
from batchlab.surgery import merge_natural, to_natural


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(24, 7), nn.Sequential(nn.ReLU(), nn.Linear(7, 2, bias=False))
    )


def images(rows: int = 50) -> Tensor:
    return torch.randn(rows, 3, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("quiet")
def test_there_training_and_back(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    model[3].eval()
    x, original = images().to(dtype), copy.deepcopy(model)
    modules, parameters = list(model.modules()), list(model.parameters())
    expected = model(x)
    expected.sum().backward()
    gradients = [p.grad for p in parameters]
    assert to_natural(model, eps=1e-2, momentum=0.5) is model
    assert [type(m) for m in (model[2], model[3][1])] == [NaturalLinear, NaturalLinear]
    assert (model[2].eps, model[2].momentum) == (1e-2, 0.5)
    assert torch.equal(model(x), expected)
    assert list(model.modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    assert [m.training for m in modules] == [m.training for m in original.modules()]
    model.train()(x)
    assert NaturalRefresh(model, torch.optim.SGD(model.parameters(), lr=0.1)).refresh()
    merged = merge_natural(pickle.loads(pickle.dumps(model)))
    assert repr(merged) == repr(original)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in original.named_parameters()]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(merged(x), expected, rtol=tolerance, atol=tolerance)
    merged.load_state_dict(original.state_dict(), strict=True)
    model.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(model(x), expected)


@pytest.mark.usefixtures("quiet")
def test_twice_is_once_and_the_root_may_be_the_layer() -> None:
    root = nn.Linear(3, 2)
    assert to_natural(root) is root
    root(torch.randn(5, 3))
    before = copy.deepcopy(root.state_dict())
    assert isinstance(to_natural(root), NaturalLinear)
    assert all(torch.equal(value, before[name]) for name, value in root.state_dict().items())
    assert type(merge_natural(root)) is nn.Linear
    assert set(vars(root)) == set(vars(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="no natural layer to merge"):
        merge_natural(root)


@pytest.mark.usefixtures("quiet")
def test_selection_shared_layers_hooks_and_extra_state() -> None:
    model = network()
    to_natural(model, select=lambda name, _: name == "2")
    assert type(model[3][1]) is nn.Linear
    with pytest.raises(ValueError, match="no linear layer to convert that select chooses"):
        to_natural(network(), select=lambda *_: False)
    layer = nn.Linear(4, 4)
    seen: list[str] = []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    layer.register_buffer("count", torch.zeros(()))
    shared = nn.Sequential(layer, nn.ReLU(), layer)
    to_natural(shared, select=lambda name, _: name == "2")
    assert shared[0] is shared[2] is layer
    shared(torch.randn(3, 4))
    assert layer.collected_count == 6
    merge_natural(shared)
    shared(torch.randn(3, 4))
    assert len(seen) == 4
    assert "count" in dict(layer.named_buffers())


class Mine(nn.Linear):
    pass


def patched() -> nn.Linear:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    return layer


def with_attribute() -> nn.Linear:
    layer = nn.Linear(3, 3)
    layer.register_buffer("center", torch.zeros(3))
    return layer


REFUSED = {
    "is a Mine, a class of its own": lambda: Mine(3, 3),
    "is a FactoredLinear": lambda: FactoredLinear(3, 3),
    "is parametrized": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "has a patched forward": patched,
    "has an attribute 'center' already": with_attribute,
    "has torch.complex64 weights": lambda: nn.Linear(3, 3, dtype=torch.complex64),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_converted_stays_with_the_reason(reason: str) -> None:
    layer = REFUSED[reason]()
    cls, keys = type(layer), set(vars(layer))
    model = nn.Sequential(layer, nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=f"left these layers as they were:\n  '0' {reason}"):
        to_natural(model)
    assert type(layer) is cls
    assert set(vars(layer)) == keys
    with pytest.raises(ValueError, match=f"these cannot be:\n  '0' {reason}"):
        to_natural(nn.Sequential(layer))


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match="'1' shares its weight or bias with another module"):
        to_natural(model)
    assert model[1].weight is model[0].weight
    natural = nn.ModuleList([NaturalLinear(3, 3), NaturalLinear(3, 3)])
    natural[1].v = natural[0].v
    with pytest.raises(ValueError, match="shares v or d with another module"):
        merge_natural(natural)


def test_wrappers_options_and_exceptions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = copy.deepcopy(model)
    with pytest.raises(TypeError, match="DataParallel"):
        to_natural(nn.DataParallel(model))
    for options in ({"eps": 0.0}, {"momentum": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            to_natural(model, **options)  # type: ignore[arg-type]
    calls = []

    def failing(self: NaturalLinear, eps: float, momentum: float | None) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(NaturalLinear, "_start", failing)
    with pytest.raises(KeyboardInterrupt):
        to_natural(model)
    assert repr(model) == repr(before)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert all(set(vars(a)) == set(vars(b)) for a, b in zip(model.modules(), before.modules(), strict=True))
