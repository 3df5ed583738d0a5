"""Batch norm over ranks that differ in how they compute (kernel, formula, not at all): same numbers and waits."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from batchlab.functional import batch_norm, update_running_statistics
from batchlab.functional.batch_norm_training import choose_backend
from batchlab.kernels import batch_norm as kernel
from tests.processes import spawn
from tests.rank_batches import CHANNELS, EPS, HIGHER, PROBLEMS, Problem, exact, leaves, tensors

needs_kernel = pytest.mark.skipif(not kernel.available(), reason="no C++ compiler")

CONSTANT_INPUT = Problem(activation="silu", residual=True, backends=("auto", "reference"))


class Watched:
    """How often this rank waits for the others, with what, and whether its kernels work."""

    def __init__(self, problem: Problem, rank: int) -> None:
        self.waits: list[str] = []
        self.fused = 0
        reduce, sums = dist.all_reduce, kernel.gradient_sums

        def all_reduce(x: Tensor, *arguments: Any, **options: Any) -> Any:
            self.waits.append(f"{tuple(x.shape)} {x.dtype}")
            return reduce(x, *arguments, **options)

        def gradient_sums(*arguments: Any) -> Tensor:
            self.fused += 1
            return sums(*arguments)

        backend = problem.backends[rank]
        self.backend = "auto" if backend == "none" else backend
        self.patches = [mock.patch.object(dist, "all_reduce", all_reduce)]
        self.patches.append(mock.patch.object(kernel, "gradient_sums", gradient_sums))
        if backend == "none":
            self.patches.append(mock.patch.object(kernel, "available", return_value=False))

    def __enter__(self) -> "Watched":
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()


def one_step(rank: int, problem: Problem) -> dict[str, Any]:
    given, g, mask = leaves(problem, rank)
    running = torch.zeros(CHANNELS, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64)
    batches = torch.tensor(0)
    with Watched(problem, rank) as watched:
        y = batch_norm(
            given["x"],
            *running,
            given["weight"],
            given["bias"],
            True,
            0.25,
            EPS,
            activation=problem.activation,
            residual=given.get("residual"),
            mask=mask,
            process_group=dist.group.WORLD,
            backend=watched.backend,
            num_batches_tracked=batches,
        )
        y.backward(g)
    found: dict[str, Any] = {name: value.grad for name, value in given.items()}
    found |= {"y": y.detach(), "running": torch.stack(running), "batches": batches}
    return found | {"waits": watched.waits, "fused": watched.fused, "strides": (y.stride(), given["x"].stride())}


def higher_step(rank: int, problem: Problem) -> dict[str, Any]:
    """A loss of the output and of gradients of first and second order."""
    given, g, mask = leaves(problem, rank)
    with Watched(problem, rank) as watched:
        y = batch_norm(
            given["x"],
            None,
            None,
            given["weight"],
            given["bias"],
            True,
            0.1,
            EPS,
            activation=problem.activation,
            residual=given.get("residual"),
            mask=mask,
            process_group=dist.group.WORLD,
            backend=watched.backend,
        )
        loss(y, g, given).backward()
    return {name: value.grad for name, value in given.items()} | {"waits": watched.waits}


def loss(y: Tensor, g: Tensor, given: dict[str, Tensor]) -> Tensor:
    first = torch.autograd.grad((y * g).sum(), list(given.values()), create_graph=True)
    penalty = sum((value.square().sum() for value in first), torch.zeros(()))
    second = torch.autograd.grad(penalty, given["x"], create_graph=True)[0]
    return (y * y).sum() + penalty + second.square().sum()


def constant_input(rank: int) -> dict[str, Any]:
    """An input without gradient: nobody waits in the backward pass."""
    given, g, _ = leaves(CONSTANT_INPUT, rank)
    with Watched(CONSTANT_INPUT, rank) as watched:
        y = batch_norm(
            given["x"].detach(),
            None,
            None,
            given["weight"],
            given["bias"],
            True,
            0.1,
            EPS,
            activation=CONSTANT_INPUT.activation,
            residual=given["residual"],
            process_group=dist.group.WORLD,
            backend=watched.backend,
        )
        y.backward(g)
    return {name: given[name].grad for name in ("weight", "bias", "residual")} | {"waits": watched.waits}


def broadcast_gradient(rank: int) -> Tensor:
    given, _, _ = leaves(Problem(activation="sigmoid"), rank)
    options: dict[str, Any] = {"activation": "sigmoid", "process_group": dist.group.WORLD}
    batch_norm(given["x"], None, None, given["weight"], given["bias"], True, 0.1, EPS, **options).sum().backward()
    return given["x"].grad  # type: ignore[return-value]


def statistics_alone(rank: int) -> Tensor:
    running = torch.zeros(CHANNELS, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64)
    x = tensors(Problem(mean=1e3))["x"][rank]
    update_running_statistics(x, *running, 0.25, process_group=dist.group.WORLD)
    return torch.stack(running)


def one_bad_number(rank: int) -> Tensor:
    running = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    x = tensors(Problem(dtype=torch.float32))["x"][rank].clone()
    if rank == 0:
        x[0, 1, 0, 0] = torch.inf
    batch_norm(x, *running, training=True, process_group=dist.group.WORLD, nonfinite="skip")
    return torch.stack(running)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for world in (2, 3):
        jobs: list[Any] = [(name, one_step, (p,)) for name, p in PROBLEMS.items() if len(p.parts) == world]
        jobs += [(f"{n}-higher", higher_step, (PROBLEMS[n],)) for n in HIGHER if len(PROBLEMS[n].parts) == world]
        if world == 2:
            jobs += [
                (work.__name__, work, ())
                for work in (constant_input, broadcast_gradient, statistics_alone, one_bad_number)
            ]
        found |= spawn(world, tmp_path_factory.mktemp(f"world{world}"), jobs)
    return found


# Relative to the largest entry; of half precision, a few roundings of what was read and what is written.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    scale = 1 + float(expected.abs().max()) if expected.numel() else 1
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * scale)


@needs_kernel
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_ranks_equal_one_process_in_float64(name: str, ranks: dict[str, list[Any]]) -> None:
    problem, results = PROBLEMS[name], ranks[name]
    expected = exact(problem)
    tolerance = TOLERANCE[problem.dtype] * (100 if problem.mean and problem.dtype == torch.float64 else 1)
    for rank, found in enumerate(results):
        for key in ("y", "x", "weight", "bias", *(["residual"] if problem.residual else [])):
            close(found[key], expected[key][rank].detach(), tolerance)
        assert found["y"].dtype == found["x"].dtype == problem.dtype
        close(found["running"], expected["running"], 1e-7 if problem.dtype != torch.float64 else 1e-12)
        assert torch.equal(found["batches"], expected["batches"])
        y_strides, x_strides = found["strides"]
        assert y_strides == x_strides or problem.layout == "strided"


@needs_kernel
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_every_rank_waits_alike_and_ends_with_the_same_bits(name: str, ranks: dict[str, list[Any]]) -> None:
    problem, results = PROBLEMS[name], ranks[name]
    world = len(results)
    forward, backward = (world, 3 * CHANNELS + 1), (2, CHANNELS)
    for rank, found in enumerate(results):
        assert found["waits"] == [f"{forward} torch.float64", f"{backward} torch.float64"]
        assert torch.equal(found["running"], results[0]["running"])
        able = problem.parts[rank] > 0 and rank not in problem.masked
        assert found["fused"] == int(able and problem.backends[rank] in ("auto", "fused"))


@needs_kernel
@pytest.mark.parametrize("name", HIGHER)
def test_gradients_of_gradients_reach_all_ranks(name: str, ranks: dict[str, list[Any]]) -> None:
    problem, results = PROBLEMS[name], ranks[f"{name}-higher"]
    expected = exact(problem, higher=True)
    for rank, found in enumerate(results):
        assert found["waits"] == results[0]["waits"]
        for key in ("x", "weight", "bias", *(["residual"] if problem.residual else [])):
            close(found[key], expected[key][rank], 1e-7 if problem.mean else 1e-10)


def test_without_a_gradient_of_the_input_nobody_waits_in_the_backward_pass(ranks: dict[str, list[Any]]) -> None:
    expected = exact(CONSTANT_INPUT)
    for rank, found in enumerate(ranks["constant_input"]):
        for name in ("weight", "bias", "residual"):
            close(found[name], expected[name][rank], 1e-11)
        assert len(found["waits"]) == 1


def test_a_gradient_that_is_one_number_everywhere(ranks: dict[str, list[Any]]) -> None:
    given = [leaves(Problem(), rank)[0] for rank in range(2)]
    x = torch.cat([rank["x"].detach() for rank in given]).requires_grad_()
    weight, bias = given[0]["weight"].detach(), given[0]["bias"].detach()
    F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS).sigmoid().sum().backward()
    close(torch.cat(ranks["broadcast_gradient"]), x.grad, 1e-11)  # type: ignore[arg-type]


def test_statistics_without_a_normalization(ranks: dict[str, list[Any]]) -> None:
    first, second = ranks["statistics_alone"]
    assert torch.equal(first, second)
    close(first, exact(Problem(mean=1e3))["running"], 1e-12)


def test_an_infinite_number_keeps_its_channel_out_on_every_rank(ranks: dict[str, list[Any]]) -> None:
    first, second = ranks["one_bad_number"]
    assert torch.equal(first, second)
    assert first[:, 1].tolist() == [0.0, 1.0]
    assert first.isfinite().all()
    assert (first[:, [0, 2, 3, 4]] != torch.tensor([[0.0], [1.0]])).all()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    with mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "lo"}):
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
        dist.destroy_process_group()


@pytest.mark.parametrize("activation", [None, "silu", "sigmoid"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_are_those_of_finite_differences(
    activation: str | None, backend: str, alone: dist.ProcessGroup
) -> None:
    given, _, _ = leaves(Problem(parts=(3,), tail=(2,), residual=True), 0)
    given = {
        name: value.detach()[..., :2, :] if value.ndim > 1 else value.detach()[:2] for name, value in given.items()
    }
    inputs = [given[name].clone().requires_grad_() for name in ("x", "weight", "bias", "residual")]

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        options: dict[str, Any] = {"process_group": alone, "backend": backend, "activation": activation}
        return batch_norm(x, None, None, weight, bias, True, residual=residual, **options)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@needs_kernel
def test_fused_takes_a_rank_without_samples_but_no_mask(alone: dist.ProcessGroup) -> None:
    x = torch.zeros(0, 3)
    assert choose_backend("fused", x, None, alone) == "reference"
    with pytest.raises(ValueError, match="does not take this call"):
        choose_backend("fused", x, None, None)
    with pytest.raises(ValueError, match="takes no mask"):
        choose_backend("fused", x, torch.ones(0, 1, dtype=torch.bool), alone)
    with pytest.raises(ValueError, match="takes no process_group"):
        choose_backend("aten", x, None, alone)


@pytest.mark.slow
def test_compiles_without_a_graph_break(alone: dist.ProcessGroup) -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, None, True, activation="silu", process_group=alone)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        x, weight = (leaves(Problem(parts=(4,)), 0)[0][name] for name in ("x", "weight"))
        y = function(x, weight)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, weight.grad])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)
