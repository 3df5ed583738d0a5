"""A step is seen by hooks and profilers as torch's own optimizers' steps are, although it is not always wrapped."""

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from batchlab.optim import SubmatrixSGD


def with_gradient() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    return parameter


def test_hooks_are_called_once_around_the_step() -> None:
    parameter = with_gradient()
    optimizer = SubmatrixSGD([parameter], lr=0.5)
    seen: list[tuple[str, float]] = []

    def note(name: str) -> Any:
        return lambda *_: seen.append((name, float(parameter.detach()[0])))

    handles = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_pre_hook(note("before all")),
        register_optimizer_step_post_hook(note("after all")),
    ]
    optimizer.step()
    assert seen == [("before all", 1.0), ("before", 1.0), ("after", 0.5), ("after all", 0.5)]
    for kept in range(4):  # each kind alone is enough
        seen.clear()
        for handle in handles[:kept]:
            handle.remove()
        optimizer.step()
        assert len(seen) == 4 - kept
    handles[-1].remove()
    seen.clear()
    optimizer.step()
    assert seen == []
    assert parameter.tolist() == [1 - 0.5 * 6] * 3


def test_a_pre_hook_may_replace_the_closure() -> None:
    optimizer = SubmatrixSGD([with_gradient()], lr=0.5)
    optimizer.register_step_pre_hook(lambda *_: ((optimizer, lambda: "other"), {}))
    assert optimizer.step(lambda: "given") == "other"


def test_the_profiler_names_the_step() -> None:
    class Ours(SubmatrixSGD):
        pass

    optimizer = Ours([with_gradient()], lr=0.5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#Ours.step" in {event.key for event in profile.key_averages()}


def test_closures_run_with_gradients_and_steps_without() -> None:
    parameter = with_gradient()
    optimizer = SubmatrixSGD([parameter], lr=0.5)
    assert optimizer.step(torch.is_grad_enabled) is True
    with torch.no_grad():
        assert optimizer.step(torch.is_grad_enabled) is True
    assert parameter.grad_fn is None


def test_schedulers_count_the_steps(recwarn: Any) -> None:
    optimizer = SubmatrixSGD([with_gradient()], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    optimizer.step()
    scheduler.step()
    assert not recwarn.list
    assert abs(scheduler.get_last_lr()[0] - 0.1) < 1e-12
