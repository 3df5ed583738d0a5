"""`to_factored`, `merge_factored`: what they refuse leaves the model as it was."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from batchlab.nn import FactoredLinear
from batchlab.reference.factored import CENTERED
from batchlab.surgery import factored_apply, initialize_from_data, merge_factored, to_factored

Snapshot = tuple[list[Any], list[Any], list[Any], dict[str, torch.Tensor]]


def snapshot(model: nn.Module) -> Snapshot:
    model_state = {key: value.clone() for key, value in model.state_dict().items()}
    return (
        [(name, id(m), type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()],
        [(name, id(p), id(p.grad), p.requires_grad) for name, p in model.named_parameters()],
        [(name, id(b)) for name, b in model.named_buffers()],
        model_state,
    )


def assert_unchanged(before: Snapshot, model: nn.Module) -> None:
    after = snapshot(model)
    assert before[:3] == after[:3]
    assert before[3].keys() == after[3].keys()
    for key, value in before[3].items():
        torch.testing.assert_close(after[3][key], value, rtol=0, atol=0, equal_nan=True)


def refused(change: Callable[[], Any], model: nn.Module, kind: type[Exception], match: str) -> None:
    before = snapshot(model)
    with pytest.raises(kind, match=match):
        change()
    assert_unchanged(before, model)


@pytest.mark.parametrize("factorization", CENTERED)
def test_a_mean_that_would_be_lost(factorization: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight -= model[0].weight.mean(1, keepdim=True)
        model[1].weight.copy_(torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 1.0]]))
    match = r"'1' cannot be factored: .* 1 of 2 units have one \(units 1\): up to 1 of .* project=True"
    refused(lambda: to_factored(model, factorization), model, ValueError, match)
    expected = model[1].weight - model[1].weight.mean(1, keepdim=True)
    to_factored(model, factorization, project=True)
    torch.testing.assert_close(model[1].weight, expected)


def test_values_that_have_no_direction() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("inf")
    refused(lambda: to_factored(model), model, ValueError, "'1' cannot be factored: .* inf or NaN")


@pytest.mark.parametrize(
    ("options", "match"),
    [({"factorization": "wn"}, "allowed are"), ({"eps": 0.0}, "eps is"), ({"eps": float("nan")}, "eps is")],
)
def test_options(options: dict[str, Any], match: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    refused(lambda: to_factored(model, **options), model, ValueError, match)


@pytest.mark.parametrize("verb", [to_factored, merge_factored, lambda m: initialize_from_data(m, torch.ones(2, 3))])
def test_wrappers_and_lazy_layers(verb: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(TypeError, match=r"pass model\.module"):
        verb(nn.DataParallel(model))
    with pytest.raises(TypeError, match=r"pass model\._orig_mod"):
        verb(torch.compile(model, backend="eager"))
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module"):
        verb(torch.relu)
    with pytest.raises(ValueError, match="not initialized"):
        verb(nn.Sequential(nn.LazyLinear(3)))
    assert type(model[0]) is nn.Linear


def test_nothing_to_do() -> None:
    with pytest.raises(ValueError, match=r"ReLU has no linear or convolution layer to factor$"):
        to_factored(nn.ReLU())
    with pytest.raises(ValueError, match="no factored layer to merge"):
        merge_factored(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="meta device"):
        to_factored(nn.Linear(3, 2, device="meta"))


@pytest.mark.parametrize("kind", [None, "weight_norm", "spectral_norm"])
def test_everything_is_undone_when_the_second_layer_fails(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    if kind is not None:
        for layer in model:
            getattr(parametrizations, kind)(layer)
    model(torch.randn(2, 4)).sum().backward()
    calls: list[int] = []

    def fail(verb: Any) -> Any:
        def change(*args: Any) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            verb(*args)

        return change

    # By import_module: the package's attributes of these names are the functions.
    factoring = importlib.import_module("batchlab.surgery.to_factored")
    merging = importlib.import_module("batchlab.surgery.merge_factored")
    monkeypatch.setattr(factoring, "factor_in_place", fail(factored_apply.factor_in_place))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        to_factored(model, kind or "weight_norm")
    assert_unchanged(before, model)
    model(torch.randn(2, 4)).sum().backward()
    monkeypatch.undo()
    to_factored(model, kind or "weight_norm")
    calls.clear()
    monkeypatch.setattr(merging, "merge_in_place", fail(factored_apply.merge_in_place))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        merge_factored(model)
    assert_unchanged(before, model)


def test_a_direction_shorter_than_eps_is_an_error_and_not_another_function() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    with torch.no_grad():
        model[0].parametrizations.weight.original1.mul_(1e-7)  # type: ignore[union-attr, operator]
    before = model[0].weight
    refused(lambda: to_factored(model), model, ValueError, "'0' would change .* give a smaller eps")
    to_factored(model, eps=1e-12)
    torch.testing.assert_close(model[0].weight, before)


def test_torchs_nan_of_a_zero_direction_becomes_zero() -> None:
    model = parametrizations.weight_norm(nn.Linear(4, 3))
    with torch.no_grad():
        model.parametrizations.weight.original1[1] = 0  # type: ignore[union-attr, operator, index]
    assert model.weight[1].isnan().all()
    to_factored(model)
    assert not model.weight[1].any()
    assert model.weight.isfinite().all()


class Own(FactoredLinear):
    pass


def test_what_is_not_merged() -> None:
    patched, tied = FactoredLinear(3, 3), FactoredLinear(3, 3)
    patched.forward = lambda *args: args[0]  # type: ignore[method-assign, assignment, misc]
    twin = FactoredLinear(3, 3)
    twin.v = tied.v
    parametrized = parametrizations.weight_norm(FactoredLinear(3, 3), "v")
    cases = {"class of its own": [Own(3, 3)], "patched": [patched], "shares v or g": [tied, twin]}
    for reason, layers in (cases | {"or parametrized": [parametrized]}).items():
        alone = nn.Sequential(*layers)
        refused(lambda model=alone: merge_factored(model), alone, ValueError, reason)  # type: ignore[misc]
        model = nn.Sequential(*layers, FactoredLinear(3, 2))
        with pytest.warns(UserWarning, match=reason):
            merge_factored(model)
        assert type(model[-1]) is nn.Linear
