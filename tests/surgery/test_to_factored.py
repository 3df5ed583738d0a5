"""`to_factored` and `merge_factored`: the same function, the same objects, there and back."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from batchlab.nn import FactoredConv2d, FactoredLinear
from batchlab.reference.factored import CENTERED, FACTORIZATIONS
from batchlab.surgery import fold, insert_batch_norm, merge_factored, to_factored


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.Tanh()),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 5),
    )


def centered(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p -= p.mean(list(range(1, p.ndim)), keepdim=True)
    return model


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def types(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if list(m.parameters(recurse=False))]


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("quiet")
def test_there_and_back_is_the_same_model(factorization: str, dtype: torch.dtype) -> None:
    model = network().to(dtype).eval()
    if factorization in CENTERED:
        centered(model)
    model[3].train()
    model[5].bias.requires_grad_(False)
    x, original = images().to(dtype), copy.deepcopy(model)
    modules, biases = list(model.modules()), [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    expected = model(x)
    assert to_factored(model, factorization) is model
    assert types(model) == ["FactoredConv2d", "BatchNorm2d", "FactoredConv2d", "FactoredLinear"]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    assert list(model.modules()) == modules
    assert [m.training for m in modules] == [m.training for m in original.modules()]
    assert [model[i].v for i in (0, 5)] + [model[3][0].v] == [weights[0], weights[2], weights[1]]
    assert [p for p in model.parameters() if p.ndim == 1] == biases
    assert all(p.dtype == dtype for p in model.parameters())
    assert merge_factored(model) is model
    assert repr(model) == repr(original)
    assert list(model.modules()) == modules
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in original.parameters()]
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    pickle.loads(pickle.dumps(model)).load_state_dict(original.state_dict(), strict=True)


@pytest.mark.usefixtures("quiet")
def test_twice_is_once_and_the_root_may_be_the_layer() -> None:
    model = to_factored(network())
    before = [(name, id(p)) for name, p in model.named_parameters()]
    assert to_factored(model) is model
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    root = nn.Linear(3, 2)
    assert to_factored(root, eps=1e-6) is root
    assert isinstance(root, FactoredLinear)
    assert root.eps == 1e-6
    assert type(merge_factored(root)) is nn.Linear
    with pytest.raises(ValueError, match="no factored layer to merge"):
        merge_factored(root)


def test_another_factorization_is_left_with_the_way_out() -> None:
    model = to_factored(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), select=lambda name, _: name == "0")
    with pytest.warns(UserWarning, match=r"'0' is factored by weight_norm: merge_factored it first"):
        to_factored(model, "spectral_norm")
    assert [layer.factorization for layer in model] == ["weight_norm", "spectral_norm"]


def test_select_by_name_and_layer() -> None:
    model = network()
    to_factored(model, select=lambda name, layer: isinstance(layer, nn.Conv2d) and name != "0")
    assert types(model) == ["Conv2d", "BatchNorm2d", "FactoredConv2d", "Linear"]
    with pytest.raises(ValueError, match="no linear or convolution layer to factor that select chooses"):
        to_factored(network(), select=lambda *_: False)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.kept = [self.first]  # a reference that no walk over modules sees

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.relu(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("quiet")
def test_a_layer_with_two_names_is_converted_once_and_everywhere() -> None:
    model = Shared()
    x, expected = torch.randn(3, 4), None
    expected = model(x)
    to_factored(model, select=lambda name, _: name == "again")
    assert model.first is model.again is model.kept[0]
    assert isinstance(model.first, FactoredLinear)
    torch.testing.assert_close(model(x), expected)
    merge_factored(model)
    assert type(model.kept[0]) is nn.Linear


@pytest.mark.usefixtures("quiet")
def test_hooks_extra_state_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    model[0].register_buffer("count", torch.zeros(()))
    model[0].note = "kept"  # type: ignore[assignment]
    model(torch.randn(2, 4)).sum().backward()
    bias_gradient = model[0].bias.grad
    seen.clear()
    to_factored(model)
    model(torch.randn(2, 4))
    assert model[0].v.grad is None
    assert model[0].bias.grad is bias_gradient
    merge_factored(model)
    model(torch.randn(2, 4))
    assert seen == ["hook", "hook"]
    assert model[0].note == "kept"
    assert "count" in dict(model[0].named_buffers())


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.usefixtures("quiet")
def test_torchs_parametrizations_become_ours_with_their_parameters(kind: str) -> None:
    model = nn.Sequential(*(getattr(parametrizations, kind)(layer) for layer in (nn.Conv2d(3, 4, 3), nn.Linear(36, 2))))
    model.insert(1, nn.Flatten())
    x = torch.randn(2, 3, 5, 5)
    for _ in range(2):
        model(x).square().sum().backward()
    twin, objects = copy.deepcopy(model), list(model.parameters())
    gradients = [p.grad for p in objects]
    state = twin.state_dict()
    to_factored(model, kind)
    assert isinstance(model[0], FactoredConv2d)
    assert not parametrize.is_parametrized(model[0])
    assert {id(p) for p in objects} <= {id(p) for p in model.parameters()}
    assert [p.grad for p in objects] == gradients
    pickle.loads(pickle.dumps(model)).load_state_dict(state, strict=True)
    for training in (True, False):
        model.train(training)
        twin.train(training)
        torch.testing.assert_close(model(x), twin(x))
    assert [p.requires_grad for n, p in model.named_parameters() if n.endswith("g")] == [kind == "weight_norm"] * 2


class Own(nn.Linear):
    pass


def left_behind() -> dict[str, tuple[nn.Module, str]]:
    patched, double, tied, named = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign, assignment, misc]
    parametrizations.weight_norm(double)
    parametrizations.orthogonal(double)
    embedding = nn.Embedding(2, 2)
    embedding.weight = tied.weight
    named.register_buffer("v", torch.zeros(()))
    whole = parametrizations.weight_norm(nn.Linear(2, 2), dim=None)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hooked = nn.utils.weight_norm(nn.Linear(2, 2))
    return {
        "own": (Own(2, 2), "is a Own, a class of its own"),
        "transposed": (nn.ConvTranspose1d(2, 2, 1), "is transposed"),
        "patched": (patched, "patched forward"),
        "double": (double, r"is parametrized \(_WeightNorm of weight, _Orthogonal of weight\)"),
        "tied": (nn.ModuleList([tied, embedding]), "'0.0' shares its weight"),
        "named": (named, "has an attribute 'v' already"),
        "whole": (whole, "is parametrized"),
        "hooked": (hooked, "a hook computes it"),
        "complex": (nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
    }


@pytest.mark.parametrize("name", left_behind())
def test_what_is_left_and_why(name: str) -> None:
    layer, reason = left_behind()[name]
    alone = nn.Sequential(layer)
    before, classes = copy.copy(dict(alone.named_parameters())), [type(m) for m in alone.modules()]
    with pytest.raises(ValueError, match=rf"these cannot be:\n  .*{reason}"):
        to_factored(alone)
    model = nn.Sequential(layer, nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=reason):
        to_factored(model)
    assert isinstance(model[1], FactoredLinear)
    assert [type(m) for m in alone.modules()] == classes
    assert all(p is before[key] for key, p in alone.named_parameters())


def test_one_weight_per_unit_is_left_by_centred_factorizations() -> None:
    model = centered(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(1, 2)))
    with torch.no_grad():
        model[1].weight.fill_(1.0)  # type: ignore[index, operator, union-attr]
    with pytest.warns(UserWarning, match="one weight per unit"):
        to_factored(model, "weight_standardization")


@pytest.mark.usefixtures("quiet")
def test_attention_and_transformer_layers_work_with_factored_feedforwards() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 8)
    expected = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_factored(layer)
    assert types(layer).count("FactoredLinear") == 2
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)


def test_other_surgery_goes_on() -> None:
    model = to_factored(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    insert_batch_norm(model)
    assert types(model) == ["FactoredConv2d", "BatchNorm2d"]
    model(images())
    expected: Any = model.eval()(images())
    merge_factored(model)
    folded = fold(model, images()).model
    torch.testing.assert_close(folded(images()), expected, rtol=1e-4, atol=1e-5)
