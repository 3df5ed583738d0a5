"""The optimizer against torch's where nothing is dropped, and against a slow loop over entries where something is."""

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchlab import kernels
from batchlab.functional import SubmatrixGradient
from batchlab.functional.submatrix import ACCEPTS
from batchlab.functional.submatrix_gradient import Block
from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from batchlab.optim import SubmatrixSGD

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "momentum-decay": {"momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
}


def mlp(p: float = 0.5, seed: int = 0, mode: str = "submatrix") -> SubmatrixSequential:
    torch.manual_seed(seed)
    return SubmatrixSequential(
        nn.Linear(6, 20),
        nn.ReLU(),
        BatchwiseDropout(p),
        nn.Linear(20, 17),
        nn.ReLU(),
        BatchwiseDropout(p),
        nn.Linear(17, 3),
        mode=mode,
    )


def convnet(p: float = 0.5) -> SubmatrixSequential:
    torch.manual_seed(0)
    return SubmatrixSequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        BatchwiseDropout(p),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        BatchwiseDropout(p),
        nn.Flatten(),
        nn.Linear(6 * 9, 2),
        mode="submatrix",
    )


def train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 4) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        net(x + step).square().mean().backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module, tolerance: float = 1e-6) -> None:
    for (name, one), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_is_torchs_where_nothing_is_dropped(name: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for make, shape in ((mlp, (5, 6)), (convnet, (5, 3, 7, 7))):
        nets = [make(0.0).to(dtype) for _ in range(2)]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        train(nets[0], SubmatrixSGD(nets[0].parameters(), lr=0.05, **OPTIONS[name]), x)
        train(nets[1], torch.optim.SGD(nets[1].parameters(), lr=0.05, **OPTIONS[name]), x)
        same(*nets, tolerance)


def test_groups_schedule_and_closure() -> None:
    results = []
    for cls in (SubmatrixSGD, torch.optim.SGD):
        net = mlp(0.0)
        groups = [
            {"params": net[0].parameters(), "lr": 0.1},
            {"params": net[3].parameters(), "momentum": 0.5, "weight_decay": 0.1, "nesterov": True},
        ]
        optimizer = cls(groups, lr=0.01)
        optimizer.add_param_group({"params": net[6].parameters(), "lr": torch.tensor(0.2)})
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

        def closure(net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = net(torch.ones(4, 6)).square().mean()
            loss.backward()
            return loss

        losses = []
        for _ in range(3):
            losses.append(optimizer.step(closure).item())
            schedule.step()
        assert losses[2] < losses[0]
        results.append(net)
    same(*results)


def slow_step(
    weight: Tensor,
    velocity: Tensor,
    gradient: Tensor,
    kept: Tensor,
    rate: float,
    momentum: float,
    decay: float,
    ahead: bool,
) -> None:
    """One entry after the other, in Python."""
    w, v, g = (t.view(-1).tolist() for t in (weight, velocity, gradient))
    for i, takes_part in enumerate(kept.reshape(-1).tolist()):
        if takes_part:
            d = g[i] + decay * w[i]
            v[i] = momentum * v[i] + d
            w[i] = w[i] - rate * (d + momentum * v[i] if ahead else v[i])
    weight.copy_(torch.tensor(w, dtype=weight.dtype).view_as(weight))
    velocity.copy_(torch.tensor(v, dtype=weight.dtype).view_as(weight))


def took_part(gradient: Tensor) -> Tensor:
    if not isinstance(gradient, SubmatrixGradient):
        return torch.ones(gradient.shape, dtype=torch.bool)
    kept = torch.zeros(gradient.shape, dtype=torch.bool)
    for block in gradient.blocks:
        here = torch.ones(gradient.shape, dtype=torch.bool)
        for dim, index in enumerate((block.rows, block.columns)):
            if index is not None:
                inside = torch.zeros(gradient.shape[dim], dtype=torch.bool)
                inside[index] = True
                here &= inside.view([-1 if d == dim else 1 for d in range(gradient.ndim)])
        kept |= here
    return kept


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_equals_a_loop_over_entries(kind: str, name: str, layout: str, batches: int) -> None:
    net = (mlp() if kind == "mlp" else convnet()).double()
    if layout == "channels-last":
        net = net.to(memory_format=torch.channels_last) if kind == "convnet" else net
    x = torch.randn((5, 6) if kind == "mlp" else (5, 3, 7, 7), dtype=torch.float64)
    options = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False} | OPTIONS[name]
    optimizer = SubmatrixSGD(net.parameters(), lr=0.1, **options)
    expected = {
        n: (p.detach().clone().contiguous(), torch.zeros(p.shape, dtype=p.dtype)) for n, p in net.named_parameters()
    }
    rested = 0
    for step in range(3):
        optimizer.zero_grad()
        for batch in range(batches):
            torch.manual_seed(10 * step + batch)
            net(x).square().mean().backward()
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        part = {}
        for n, p in net.named_parameters():
            part[n] = took_part(p.grad)
            gradient = p.grad.to_dense() if isinstance(p.grad, SubmatrixGradient) else p.grad
            slow_step(
                *expected[n],
                gradient.contiguous(),
                part[n],
                0.1,
                *(options[o] for o in ("momentum", "weight_decay", "nesterov")),
            )
        optimizer.step()
        for n, p in net.named_parameters():
            torch.testing.assert_close(p.detach().contiguous(), expected[n][0], rtol=1e-13, atol=1e-13)
            assert torch.equal(p.detach()[~part[n]], before[n][~part[n]])  # to the bit
            rested += int((~part[n]).sum())
            if options["momentum"]:
                torch.testing.assert_close(
                    optimizer.state[p]["momentum_buffer"].contiguous(), expected[n][1], rtol=1e-13, atol=1e-13
                )
    assert rested > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_entries_at_rest_do_not_move(dtype: torch.dtype) -> None:
    net = mlp().to(dtype)
    optimizer = SubmatrixSGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(net, optimizer, torch.randn(5, 6).to(dtype))
    optimizer.zero_grad()
    net(torch.randn(5, 6).to(dtype)).sum().backward()
    rows, columns = net[5].kept, net[2].kept
    before, velocity = net[3].weight.detach().clone(), optimizer.state[net[3].weight]["momentum_buffer"].clone()
    optimizer.step()
    inside = torch.zeros(17, 20, dtype=torch.bool)
    inside[rows[:, None], columns] = True
    assert torch.equal(net[3].weight[~inside], before[~inside])
    assert torch.equal(optimizer.state[net[3].weight]["momentum_buffer"][~inside], velocity[~inside])
    assert (net[3].weight[inside] != before[inside]).float().mean() > 0.5


@pytest.mark.parametrize("order", ["ours-to-torch", "torch-to-ours"])
@pytest.mark.parametrize("name", OPTIONS)
def test_state_dicts_are_exchanged_with_torch(name: str, order: str) -> None:
    first, second = (SubmatrixSGD, torch.optim.SGD) if order == "ours-to-torch" else (torch.optim.SGD, SubmatrixSGD)
    x = torch.randn(5, 6)
    net = mlp(0.0)
    optimizer = first(net.parameters(), lr=0.05, **OPTIONS[name])
    train(net, optimizer, x)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream)
    twin = copy.deepcopy(net)
    other = second(twin.parameters(), lr=1.0)
    other.load_state_dict(state)
    train(net, optimizer, x)
    train(twin, other, x)
    same(net, twin)


def test_states_that_it_cannot_continue_are_refused() -> None:
    net = mlp()
    for options in ({"momentum": 0.9, "dampening": 0.5}, {"maximize": True}):
        name = list(options)[-1]
        state = torch.optim.SGD(net.parameters(), lr=0.1, **options).state_dict()
        with pytest.raises(ValueError, match=f"{name}.*continue with torch.optim.SGD"):
            SubmatrixSGD(net.parameters(), lr=0.1).load_state_dict(state)


def asks(net: nn.Module) -> bool:
    found = {bool(getattr(p, ACCEPTS, False)) for p in net.parameters()}
    assert len(found) == 1
    return found.pop()


def test_stops_asking_when_it_dies() -> None:
    net = mlp()
    assert not asks(net)
    optimizer: Any = SubmatrixSGD(net.parameters(), lr=0.1)
    assert asks(net)
    optimizer = SubmatrixSGD(net.parameters(), lr=0.2)  # the old one dies after the new one was made
    gc.collect()
    assert asks(net)
    net(torch.ones(2, 6)).sum().backward()
    assert isinstance(net[3].weight.grad, SubmatrixGradient)
    optimizer.zero_grad()
    del optimizer
    gc.collect()
    assert not asks(net)
    net(torch.ones(2, 6)).sum().backward()
    assert type(net[3].weight.grad) is Tensor


def test_copies_of_the_model_do_not_ask() -> None:
    net = mlp()
    optimizer = SubmatrixSGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, torch.randn(5, 6))
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(stream, weights_only=False)):
        assert not asks(other)
        same(net, other, 0)
        mine = SubmatrixSGD(other.parameters(), lr=0.1)
        assert asks(other)
        del mine
    torch.save(list(net.parameters()), stream := io.BytesIO())
    stream.seek(0)
    assert len(torch.load(stream)) == 6  # with weights_only, which knows few types
    assert asks(net)


def test_copies_of_the_optimizer_ask() -> None:
    net = mlp()
    optimizer = SubmatrixSGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, torch.randn(5, 6))
    twin, other = copy.deepcopy((net, optimizer))
    assert asks(twin)
    train(net, optimizer, torch.ones(5, 6))
    train(twin, other, torch.ones(5, 6))
    same(net, twin, 0)
    assert repr(other) == repr(optimizer)


def test_scaler_and_clipping() -> None:
    results = []
    for mode in ("submatrix", "mask"):
        net = mlp(mode=mode)
        optimizer = SubmatrixSGD(net.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(3):
            optimizer.zero_grad()
            torch.manual_seed(step)
            scaler.scale(net(torch.ones(4, 6)).square().sum()).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5, foreach=step == 1)
            assert norm > 0.5
            torch.nn.utils.clip_grad_value_(net.parameters(), 0.05, foreach=step == 1)
            assert isinstance(net[3].weight.grad, SubmatrixGradient)
            scaler.step(optimizer)
            scaler.update()
        results.append(net)
    same(*results)


def test_scaler_skips_a_step_with_infinities() -> None:
    net = mlp()
    before = copy.deepcopy(net)
    optimizer = SubmatrixSGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(net(torch.full((4, 6), 1e38)).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    same(net, before, 0)


def test_zeroed_gradients_rest() -> None:
    net = mlp()
    optimizer = SubmatrixSGD(net.parameters(), lr=0.1, weight_decay=0.5)
    net(torch.ones(4, 6)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    before = net[3].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[3].weight, before)  # nothing took part


def test_dense_and_short_gradients_on_one_weight() -> None:
    """The penalty reaches every entry, so every entry takes part."""
    net, other = mlp().double(), mlp(mode="mask").double()
    for one, optimizer in (
        (net, SubmatrixSGD(net.parameters(), lr=0.1, momentum=0.9)),
        (other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)),
    ):
        for step in range(3):
            optimizer.zero_grad()
            torch.manual_seed(step)
            penalty = sum(p.square().sum() for p in one.parameters())
            (one(torch.ones(4, 6, dtype=torch.float64)).sum() + penalty).backward()
            optimizer.step()
    same(net, other, 1e-13)


def test_frozen_and_unused_parameters() -> None:
    net = mlp()
    net[3].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    before = net[3].weight.clone()
    optimizer = SubmatrixSGD([*net.parameters(), unused], lr=0.1, momentum=0.9, weight_decay=0.1)
    train(net, optimizer, torch.randn(4, 6))
    assert torch.equal(net[3].weight, before)
    assert torch.equal(unused, torch.ones(3))
    assert unused not in optimizer.state


@pytest.mark.parametrize("mode", ["submatrix", "mask"])
def test_only_some_parameters_are_held(mode: str) -> None:
    """The bias asks and its weight does not, and the other way round."""
    net = mlp(mode=mode)
    optimizer = SubmatrixSGD([net[3].bias, net[6].weight, net[0].weight], lr=0.1)
    net(torch.randn(4, 6)).sum().backward()
    kinds = {name: type(p.grad) is SubmatrixGradient for name, p in net.named_parameters()}
    assert kinds == {
        "0.weight": True,
        "0.bias": False,
        "3.weight": False,
        "3.bias": True,
        "6.weight": True,
        "6.bias": False,
    }
    optimizer.step()


@pytest.mark.skipif(not kernels.submatrix.available(), reason="no C++ compiler: the blocks are copies, and still right")
def test_a_backward_after_the_step_is_refused_as_in_torch() -> None:
    net = mlp()
    optimizer = SubmatrixSGD(net.parameters(), lr=0.1)
    loss = net(torch.ones(4, 6)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_odd_parameters() -> None:
    """Scalars, three dimensions, a transposed weight, no entries at all."""
    shapes: list[Tensor] = [
        torch.randn(()),
        torch.randn(2, 3, 4),
        torch.randn(3, 5).t(),
        torch.randn(0, 3),
        torch.randn(0),
    ]
    results = []
    for cls in (SubmatrixSGD, torch.optim.SGD):
        parameters = [nn.Parameter(s.clone()) for s in shapes]
        optimizer = cls(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            sum(p.sin().sum() for p in parameters).backward()
            optimizer.step()
        results.append(parameters)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_made_by_hand() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = SubmatrixSGD([weight], lr=1.0)
    rows, columns = torch.tensor([0, 2]), torch.tensor([1])
    weight.grad = SubmatrixGradient(weight.shape, [Block(rows, columns, torch.tensor([[1.0], [2.0]]))])
    optimizer.step()
    expected = torch.zeros(3, 4)
    expected[0, 1], expected[2, 1] = -1, -2
    assert torch.equal(weight, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1; it must be 0 or more"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 1.0}, "momentum is 1.0; it must be from 0 to below 1"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"nesterov": True}, "nesterov looks ahead along the momentum, which is 0"),
    ],
    ids=["lr", "lr-nan", "momentum-1", "momentum-negative", "decay", "nesterov"],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=message):
        SubmatrixSGD([weight], **options)
    assert not hasattr(weight, ACCEPTS)
    optimizer = SubmatrixSGD([weight])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **options})


@pytest.mark.parametrize(
    "cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop], ids=["sgd", "adam", "rmsprop"]
)
def test_other_optimizers_step_on_short_gradients(cls: Any) -> None:
    """While a SubmatrixSGD lives, another optimizer sees short gradients, and takes them as dense ones."""
    results = []
    for ask in (True, False):
        net = mlp().double()
        asking = SubmatrixSGD(net.parameters(), lr=0.1) if ask else None
        train(net, cls(net.parameters(), lr=0.01, weight_decay=0.1), torch.ones(5, 6, dtype=torch.float64))
        assert isinstance(net[3].weight.grad, SubmatrixGradient) == ask
        results.append(net)
        del asking
    same(*results, 1e-13)
