"""Gradients of batch norm's compiled node: every order, every subset of inputs, and every way autograd is used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchlab import functional, nn
from batchlab.kernels import batch_norm as kernel
from tests.batch_norm_tables import ACTIVATIONS

pytestmark = pytest.mark.skipif(not kernel.available(), reason="there is no C++ compiler")

INPUTS = ("x", "weight", "bias", "residual")
MEAN, VARIANCE = torch.tensor([0.3, -0.7], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)


def _leaves(shape: tuple[int, ...] = (4, 2, 2), dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, weight, bias and residual."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape).to(dtype)
    weight = torch.rand(shape[1], dtype=wide) + 0.5
    weight[0] *= -1
    return tuple(
        t.requires_grad_() for t in (x, weight, torch.randn(shape[1], dtype=wide), torch.randn(shape).to(dtype))
    )


def _call(
    training: bool, activation: str | None, backend: str = "fused"
) -> Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]:
    """The function of x, weight, bias and residual; in evaluation with statistics of two channels."""

    def call(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        running = (None, None) if training else (MEAN.to(x.device), VARIANCE)
        return functional.batch_norm(
            x, *running, weight, bias, training, activation=activation, residual=residual, backend=backend
        )

    return call


def _torchs(training: bool, activation: str | None) -> Callable[..., Tensor]:
    """The same function by torch's operations in float64."""

    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        given = [None if t is None else t.double() for t in (x, weight, bias, residual)]
        assert given[0] is not None
        running = (None, None) if training else (MEAN, VARIANCE)
        y = F.batch_norm(given[0], *running, given[1], given[2], training, 0.0, 1e-5)
        return ACTIVATIONS[activation](y if given[3] is None else y + given[3])

    return call


MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@MODES
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_order_against_differences(
    activation: str | None, with_residual: bool, training: bool
) -> None:
    inputs = _leaves((3, 2, 2)) if with_residual else _leaves((3, 2, 2))[:3]
    call = _call(training, activation)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@MODES
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_third_order_against_differences(activation: str | None, with_residual: bool, training: bool) -> None:
    inputs = _leaves((3, 2)) if with_residual else _leaves((3, 2))[:3]
    call = _call(training, activation)
    directions = [torch.randn_like(t) for t in inputs]
    weights = torch.randn(3, 2, dtype=torch.float64)

    def second(*given: Tensor) -> tuple[Tensor, ...]:
        """Second derivatives along a direction; its own derivatives are the third ones."""
        loss = (call(*given).pow(2) * weights).sum()
        first = torch.autograd.grad(loss, given, create_graph=True)
        along = torch.stack([(g * d).sum() for g, d in zip(first, directions, strict=True)]).sum()
        return torch.autograd.grad(along, given, create_graph=True)

    assert torch.autograd.gradcheck(second, inputs)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_gradients_are_the_reference_s(dtype: torch.dtype, training: bool) -> None:
    leaves = _leaves((6, 2, 5), dtype)
    for activation in ACTIVATIONS:
        results = []
        for backend in ("fused", "reference"):
            y = _call(training, activation, backend)(*leaves)
            first = torch.autograd.grad(y.float().pow(2).sum(), leaves, create_graph=True)
            second = torch.autograd.grad(torch.stack([g.float().pow(2).sum() for g in first]).sum(), leaves)
            results.append([*(g.detach() for g in first), *second])
        limit = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            scale = float(theirs.double().abs().max())
            assert float((ours.double() - theirs.double()).abs().max()) <= limit * max(scale, 1.0)


SUBSETS = [subset for size in range(1, 5) for subset in combinations(INPUTS, size)]


@MODES
@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_any_subset_of_the_inputs_has_gradients(subset: tuple[str, ...], training: bool) -> None:
    values = dict(zip(INPUTS, (t.detach() for t in _leaves((5, 2, 3))), strict=True))
    gradient = torch.randn(5, 2, 3, dtype=torch.float64)
    for activation in ACTIVATIONS:
        found = []
        for call in (_call(training, activation), _torchs(training, activation)):
            given = {name: value.clone().requires_grad_(name in subset) for name, value in values.items()}
            y = call(*(given[name] for name in INPUTS))
            again = torch.autograd.grad(y, [given[name] for name in subset], gradient, create_graph=True)
            y.backward(gradient)
            assert all((given[name].grad is None) == (name not in subset) for name in INPUTS)
            found += [[given[name].grad for name in subset], [g.detach() for g in again]]
        for others in found[1:]:
            torch.testing.assert_close(found[0], others, rtol=1e-9, atol=1e-10)


@MODES
@pytest.mark.parametrize("present", [(), ("weight",), ("bias",), ("residual",), ("weight", "residual")], ids=str)
def test_inputs_that_are_not_there_have_no_edge(present: tuple[str, ...], training: bool) -> None:
    leaves = dict(zip(INPUTS, _leaves((5, 2, 3)), strict=True))
    for activation in (None, "relu", "silu"):
        given = [leaves["x"], *(leaves[name] if name in present else None for name in INPUTS[1:])]
        wanted = [leaves[name] for name in ("x", *present)]
        results = []
        for call in (_call(training, activation), _torchs(training, activation)):
            results.append(torch.autograd.grad(call(*given).pow(3).sum(), wanted))
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


@MODES
def test_an_input_that_is_its_own_residual(training: bool) -> None:
    x = _leaves()[0]
    for activation in ACTIVATIONS:
        results = []
        for call in (_call(training, activation), _torchs(training, activation)):
            results.append(torch.autograd.grad(call(x, None, None, x).pow(3).sum(), x))
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_graph_that_is_kept_gives_the_same_twice(activation: str | None) -> None:
    leaves = _leaves((6, 3, 4), torch.float32)
    y = _call(True, activation)(*leaves)
    gradient = torch.randn(y.shape)
    first, second = (torch.autograd.grad(y, leaves, gradient, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    torch.autograd.grad(y, leaves, gradient)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, gradient)


def test_an_output_that_is_used_twice() -> None:
    leaves = _leaves()
    results = []
    for call in (_call(True, "relu"), _torchs(True, "relu")):
        y = call(*leaves)
        results.append(
            torch.autograd.grad((y * y.detach().flip(0)).sum() + call(y, None, None, y).pow(2).sum(), leaves)
        )
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


@MODES
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_changes_in_place_is_noticed_or_does_no_harm(
    activation: str | None, with_residual: bool, training: bool
) -> None:
    leaves = _leaves((5, 2, 3))
    weights = torch.randn(5, 2, 3, dtype=torch.float64)
    used = leaves if with_residual else leaves[:3]
    exact = torch.autograd.grad((_torchs(training, activation)(*used, *[None] * (4 - len(used))) * weights).sum(), used)
    for changed in (*INPUTS[: len(used)], "output"):
        copies = [t.clone() for t in used]  # not leaves: these can change in place
        y = _call(training, activation)(*copies)
        with torch.no_grad():
            (y if changed == "output" else copies[INPUTS.index(changed)]).add_(1)
        saved = with_residual and activation == "sigmoid"  # which the output tells of; of a ReLU it is a mask
        try:
            found = torch.autograd.grad((y * weights).sum(), used)
        except RuntimeError as error:
            found, message = None, str(error)
        if found is None:
            assert "modified by an inplace operation" in message
            assert changed != "output" or saved
        else:
            assert changed != "x"
            assert changed != "output" or not saved
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)


def test_an_output_activated_in_place_has_the_right_gradient() -> None:
    x, weight, bias, _ = _leaves((5, 2, 3))
    results = []
    for activation, call in ((None, _call(True, None)), ("relu", _call(True, "relu"))):
        y = call(x, weight, bias, None)
        y = y.relu_() if activation is None else y
        results.append(torch.autograd.grad(y.pow(3).sum(), (x, weight, bias)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_hooks_see_and_change_gradients() -> None:
    x, weight, bias, residual = _leaves()
    seen: list[Tensor] = []
    results = []
    for call in (_call(True, "silu"), _torchs(True, "silu")):
        y = call(x, weight, bias, residual)
        y.register_hook(lambda g: 2 * g)
        handles = [t.register_hook(lambda g: seen.append(g)) for t in (x, weight)]
        results.append(torch.autograd.grad(y.sum(), (x, weight, bias, residual)))
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)
    assert len(seen) == 4
    accumulated: list[Tensor] = []
    weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad))
    _call(True, "silu")(x, weight, bias, residual).sum().backward()
    assert len(accumulated) == 1


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_graph_keeps_one_tensor_of_the_input_s_size_or_two(activation: str | None, with_residual: bool) -> None:
    leaves = _leaves((64, 2, 8))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = _call(True, activation)(*leaves[: 4 if with_residual else 3])
    large = [t for t in kept if t.numel() == y.numel()]
    assert len(large) == 1 + (with_residual and activation in ("silu", "sigmoid"))  # of a ReLU a bit a number
    with torch.autograd.graph.save_on_cpu():
        again = _call(True, activation)(*leaves[: 4 if with_residual else 3])
    for ours, theirs in zip(*(torch.autograd.grad(o.sum(), leaves[:3]) for o in (y, again)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes(reentrant: bool) -> None:
    plain = nn.BatchNorm1d(3, activation="relu", backend="fused")
    other = copy.deepcopy(plain)
    torchs = torch.nn.BatchNorm1d(3)
    x = torch.randn(8, 3, 4)
    results = []
    for run in (plain, lambda x: checkpoint(other, x, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.pow(2).sum().backward()
        results.append((y.detach(), leaf.grad))
    for ours, theirs in zip(results[0], results[1], strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    # The recomputation is a training step of its own to the running statistics, as it is to torch's.
    checkpoint(torchs, x.requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert other.num_batches_tracked == torchs.num_batches_tracked == 2
    torch.testing.assert_close(other.running_mean, torchs.running_mean)
    torch.testing.assert_close(other.running_var, torchs.running_var)


@MODES
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_many_gradients_at_once(activation: str | None, training: bool) -> None:
    x, _, _, residual = _leaves((4, 2))
    call = _call(training, activation)

    def loss(x: Tensor, residual: Tensor) -> Tensor:
        return call(x, None, None, residual).pow(3).sum()

    for derivatives in (
        lambda vectorize: torch.autograd.functional.jacobian(
            lambda x, r: call(x, None, None, r), (x, residual), vectorize=vectorize
        ),
        lambda vectorize: torch.autograd.functional.hessian(loss, (x, residual), vectorize=vectorize),
    ):
        torch.testing.assert_close(derivatives(True), derivatives(False), rtol=1e-9, atol=1e-10)


@MODES
@pytest.mark.parametrize("of", ["x", "weight", "residual"])
def test_forward_mode_is_not_dropped(of: str, training: bool) -> None:
    """No input requires a gradient here: the node would record nothing, and the tangent would be lost."""
    values = dict(zip(INPUTS, (t.detach() for t in _leaves()), strict=True))
    tangent = torch.randn_like(values[of])
    call = _call(training, "silu", "auto")
    with forward_ad.dual_level():
        duals = values | {of: forward_ad.make_dual(values[of], tangent)}
        found = forward_ad.unpack_dual(call(*(duals[name] for name in INPUTS))).tangent
    assert found is not None
    step = 1e-6
    ends = [call(*(v + s * tangent if name == of else v for name, v in values.items())) for s in (step, -step)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        functional.batch_norm(values["x"], None, None, training=True, backend="fused")


Derivative = Callable[[Callable[[Tensor], Tensor], Tensor], Any]
TRANSFORMS: dict[str, tuple[Derivative, Derivative]] = {
    "grad": (lambda f, x: func.grad(f)(x), lambda f, x: torch.autograd.functional.jacobian(f, x)),
    "jacrev": (lambda f, x: func.jacrev(f)(x), lambda f, x: torch.autograd.functional.jacobian(f, x)),
    "jacfwd": (lambda f, x: func.jacfwd(f)(x), lambda f, x: torch.autograd.functional.jacobian(f, x)),
    "hessian": (lambda f, x: func.hessian(f)(x), lambda f, x: torch.autograd.functional.hessian(f, x)),
}


@MODES
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms_take_the_plain_path(transform: str, training: bool) -> None:
    x, weight, bias, residual = (t.detach() for t in _leaves((4, 2)))
    theirs, autograds = TRANSFORMS[transform]
    for activation in (None, "silu"):
        call = _call(training, activation, "auto")
        with_kernel = autograds(lambda x, call=call: call(x, weight, bias, residual).pow(3).sum(), x)
        found = theirs(lambda x, call=call: call(x, weight, bias, residual).pow(3).sum(), x)
        torch.testing.assert_close(found, with_kernel, rtol=1e-9, atol=1e-10)


def test_vmap_normalizes_each_batch_of_its_own() -> None:
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    call = _call(True, "relu", "auto")
    each = torch.stack([call(batch) for batch in x])
    torch.testing.assert_close(func.vmap(call)(x), each)
    gradients = func.vmap(func.grad(lambda x: call(x).pow(3).sum()))(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.stack([call(batch).pow(3).sum() for batch in leaf]).sum(), leaf)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-10)
    layer = nn.BatchNorm1d(2).double()
    layer.update_statistics = False
    torch.testing.assert_close(func.vmap(layer)(x), torch.stack([layer(batch) for batch in x]))


def test_an_evaluation_s_gradient_belongs_to_its_own_statistics() -> None:
    layer = nn.BatchNorm1d(2, activation="silu", backend="fused").double().eval()
    x = _leaves()[0]
    y = layer(x)
    (before,) = torch.autograd.grad(y.pow(2).sum(), x, retain_graph=True)
    layer.train()(torch.randn(6, 2, 2, dtype=torch.float64) + 5)
    for create_graph in (False, True):
        (after,) = torch.autograd.grad(y.pow(2).sum(), x, retain_graph=True, create_graph=create_graph)
        torch.testing.assert_close(after.detach(), before, rtol=1e-12, atol=1e-12)
