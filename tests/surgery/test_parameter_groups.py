"""`parameter_groups`: a partition, in which exactly the weights decay, and which optimizers take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from batchlab import nn as ours
from batchlab import optim
from batchlab.surgery import parameter_groups


def names(model: nn.Module, **options: Any) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in parameter_groups(model, 0.1, **options)}


def decaying(model: nn.Module, **options: Any) -> list[str]:
    return names(model, **options).get("decay", [])


# What decays in one of each, written by hand.
LAYERS: list[tuple[Any, list[str]]] = [
    (lambda: nn.Linear(3, 1), ["weight"]),
    (lambda: nn.Linear(1, 3), ["weight"]),
    (lambda: nn.Bilinear(2, 3, 4), ["weight"]),
    (lambda: nn.Conv3d(2, 2, 3, groups=2), ["weight"]),
    (lambda: nn.ConvTranspose1d(2, 3, 3), ["weight"]),
    (lambda: nn.Embedding(5, 3), ["weight"]),
    (lambda: nn.LSTM(2, 3), ["weight_ih_l0", "weight_hh_l0"]),
    (lambda: nn.GRU(2, 3, bidirectional=True), [f"weight_{k}h_l0{d}" for d in ("", "_reverse") for k in "ih"]),
    (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
    (lambda: nn.BatchNorm2d(3), []),
    (lambda: nn.SyncBatchNorm(3), []),
    (lambda: nn.InstanceNorm2d(3, affine=True), []),
    (lambda: nn.LayerNorm((3, 4, 5)), []),
    (lambda: nn.RMSNorm((3, 4)), []),
    (lambda: nn.GroupNorm(2, 4), []),
    (lambda: nn.PReLU(7), []),
    (lambda: ours.BatchNorm1d(3), []),
    (lambda: ours.MeanOnlyBatchNorm1d(3), []),
    (lambda: ours.Whitening1d(4, group_size=2), []),
    (lambda: ours.Whitening1d(4, group_size=2, coloring=True), []),
    (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), ["parametrizations.weight.original1"]),
    (lambda: parametrizations.spectral_norm(nn.Linear(3, 4)), ["parametrizations.weight.original"]),
    (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), ["parametrizations.weight.original"]),
    (lambda: parametrizations.spectral_norm(nn.LayerNorm((3, 4))), []),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_each_kind_of_layer_by_hand() -> None:
    for make, expected in LAYERS:
        layer = make()
        assert sorted(decaying(layer)) == sorted(expected), layer
        inside = nn.Sequential(nn.ReLU(), nn.Sequential(layer))
        assert sorted(decaying(inside)) == sorted(f"1.0.{name}" for name in expected), layer
    assert decaying(weight_norm(nn.Conv2d(3, 4, 3))) == ["weight_v"]


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.gamma = nn.Parameter(torch.ones(4))
        self.table = nn.Parameter(torch.ones(1, 4))
        self.bias_table = nn.Parameter(torch.ones(4, 4))
        self.biased = nn.Parameter(torch.ones(4, 4))
        self.g = nn.Parameter(torch.ones(4, 1))
        self.parts = nn.ParameterList([torch.ones(2), torch.ones(2, 2)])


def test_a_matrix_called_g_is_no_gain_without_a_direction_beside_it() -> None:
    module = nn.Module()
    module.g = nn.Parameter(torch.ones(3, 3))
    assert decaying(module) == ["g"]
    module.v = nn.Parameter(torch.ones(3, 3))
    assert decaying(module) == ["v"]


def test_parameters_of_unknown_modules_go_by_shape_and_name() -> None:
    assert decaying(Custom()) == ["table", "biased", "parts.1"]


def test_no_decay_by_class_and_by_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "custom": Custom(), "head": nn.Linear(4, 5)})
    everything = ["embed.weight", "custom.table", "custom.biased", "custom.parts.1", "head.weight"]
    assert decaying(model) == everything
    assert decaying(model, no_decay=nn.Embedding) == everything[1:]
    assert decaying(model, no_decay="custom.*") == ["embed.weight", "head.weight"]
    assert decaying(model, no_decay=[nn.Linear, "*.table", "*.parts.?"]) == ["embed.weight", "custom.biased"]
    assert decaying(model, no_decay=nn.Module) == []
    for rule in ("head", "*.Weight", nn.Conv2d):
        with pytest.raises(ValueError, match=r"no parameter .* no_decay's (pattern|class)"):
            parameter_groups(model, 0.1, no_decay=[rule])
    for wrong in (3, int, nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="no_decay holds"):
            parameter_groups(model, 0.1, no_decay=[wrong])  # type: ignore[list-item]


def test_a_parameter_in_several_places_decays_if_it_is_a_weight_in_one() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "norm": nn.LayerNorm((5, 4))})
    head, norm = model["head"], model["norm"]
    head.weight = model["embed"].weight
    norm.weight = model["embed"].weight
    norm.bias = head.bias = nn.Parameter(torch.zeros(5, 4))
    assert names(model) == {"decay": ["embed.weight"], "no_decay": ["head.bias"]}
    assert decaying(model, no_decay="norm.weight") == []
    shared = nn.Linear(3, 3)
    assert names(nn.Sequential(shared, nn.ReLU(), shared)) == {"decay": ["0.weight"], "no_decay": ["0.bias"]}
    assert decaying(nn.Sequential(shared, nn.Sequential(shared)), no_decay="1.0.*") == []


leaf = st.sampled_from(range(len(LAYERS)))
trees = st.recursive(leaf, lambda inner: st.lists(inner, min_size=1, max_size=4), max_leaves=10)


@settings(max_examples=60, deadline=None)
@given(tree=trees, ties=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=3), data=st.data())
def test_partition(tree: Any, ties: list[tuple[int, int]], data: st.DataObject) -> None:
    def build(node: Any) -> nn.Module:
        return LAYERS[node][0]() if isinstance(node, int) else nn.Sequential(*map(build, node))

    model = nn.Sequential(build(tree), nn.Linear(2, 2))
    modules = list(model.modules())
    for first, second in ties:  # the same module, registered once more
        model.add_module(f"again{first}", modules[1 + (first + second) % (len(modules) - 1)])
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    before = [(id(p), p.requires_grad, p.clone()) for p in model.parameters()]
    groups = parameter_groups(model, 0.25)
    assert [group["name"] for group in groups] in (["decay"], ["decay", "no_decay"])
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0][: len(groups)]
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
    where = dict(model.named_parameters())
    for group in groups:
        assert [id(where[name]) for name in group["param_names"]] == [id(p) for p in group["params"]]
        order = [entry[0] for entry in before]
        assert [order.index(id(p)) for p in group["params"]] == sorted(order.index(id(p)) for p in group["params"])
    for (old_id, old_grad, value), p in zip(before, model.parameters(), strict=True):
        assert (old_id, old_grad) == (id(p), p.requires_grad)
        assert torch.equal(value, p)
    torch.optim.SGD(groups, lr=0.1)


OPTIMIZERS: list[type[torch.optim.Optimizer]] = [torch.optim.SGD, torch.optim.AdamW, optim.SubmatrixSGD]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_zero_gradients_only_weights_shrink(optimizer: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.PReLU(3), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    before = copy.deepcopy(dict(model.named_parameters()))
    step = optimizer(parameter_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in ("0.weight", "3.weight") else 1.0
        torch.testing.assert_close(parameter, before[name] * factor)
    other = optimizer(parameter_groups(model, 0.5), lr=0.3)
    other.load_state_dict(step.state_dict())
    assert [group["name"] for group in other.param_groups] == ["decay", "no_decay"]
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.1]


def test_prelu_follows_the_update_of_the_paper() -> None:
    # Section 2.1: delta a = mu delta a + eps dE/da, without decay, from 0.25.
    prelu = nn.PReLU(2)
    assert prelu.weight.tolist() == [0.25, 0.25]
    optimizer = torch.optim.SGD(parameter_groups(prelu, 0.5), lr=0.1, momentum=0.9)
    x = torch.tensor([[-1.0, 2.0], [-3.0, -4.0]])
    slopes, step = [0.25, 0.25], [0.0, 0.0]
    for _ in range(3):
        optimizer.zero_grad()
        prelu(x).sum().backward()
        optimizer.step()
        for channel in range(2):
            gradient = sum(min(0.0, row[channel]) for row in x.tolist())
            step[channel] = 0.9 * step[channel] + gradient
            slopes[channel] -= 0.1 * step[channel]
    torch.testing.assert_close(prelu.weight, torch.tensor(slopes))


def test_wrapped_models_and_empty_groups() -> None:
    assert names(nn.DataParallel(nn.Linear(2, 2))) == {"decay": ["module.weight"], "no_decay": ["module.bias"]}
    assert list(names(nn.Linear(2, 2, bias=False))) == ["decay"]
    assert list(names(nn.BatchNorm1d(2))) == ["no_decay"]
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        parameter_groups(nn.ReLU(), 0.1)
    with pytest.raises(ValueError, match=r"'0.weight' is not initialized"):
        parameter_groups(nn.Sequential(nn.LazyLinear(3)), 0.1)
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got list"):
        parameter_groups([nn.Linear(2, 2)], 0.1)  # type: ignore[arg-type]
    for wrong in (-1e-9, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="weight_decay is"):
            parameter_groups(nn.Linear(2, 2), wrong)
