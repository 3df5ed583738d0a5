"""One pass on squares against sums over layers, dense copies of convolutions, and what has no path norm."""

import copy
import itertools
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchlab.nn import BatchwiseDropout, DropPath, FactoredLinear, SubmatrixSequential
from batchlab.optim.path_norm import path_sums
from batchlab.reference import path_norm as reference


def kappas(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, path_sums(model, [shape], list(named.values()))[1], strict=True))


def mlp(*sizes: int, bias: bool = True, between: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for one, other in itertools.pairwise(sizes):
        layers += [nn.Linear(one, other, bias=bias), between()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("between", [nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Identity])
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("sizes", [(3, 2), (4, 5, 3), (2, 3, 4, 3, 1)], ids=str)
def test_a_chain_has_the_sums_over_its_layers(sizes: tuple[int, ...], bias: bool, between: type[nn.Module]) -> None:
    model = mlp(*sizes, bias=bias, between=between)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    weights = [layer.weight.detach().double() for layer in linear]
    biases = [layer.bias.detach().double() if bias else None for layer in linear]
    total, _ = path_sums(model, [(7, sizes[0])], [])
    torch.testing.assert_close(total.sqrt(), reference.path_norm(weights, biases))
    expected = [k for pair in zip(*reference.kappas(weights, biases), strict=True) for k in pair if k is not None]
    for kappa, right in zip(kappas(model, (7, sizes[0])).values(), expected, strict=True):
        torch.testing.assert_close(kappa, right)


def unrolled(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """A linear layer without bias as a matrix, from its answers to unit vectors."""
    size = torch.Size(shape).numel()
    return layer(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1).t()


LINEAR: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("conv", nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (2, 5, 6)),
    ("groups", nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same", bias=False), (4, 5, 5)),
    ("circular", nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular", bias=False), (2, 5)),
    ("transposed", nn.ConvTranspose2d(2, 3, 3, stride=2, bias=False), (2, 3, 3)),
    ("average", nn.AvgPool2d(3, stride=2, padding=1), (2, 6, 7)),
    ("average-edge", nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False), (2, 6, 7)),
    ("average-ceil", nn.AvgPool2d(2, ceil_mode=True), (1, 5, 5)),
    ("average-divisor", nn.AvgPool2d(2, divisor_override=3), (1, 4, 4)),
    ("average-1d", nn.AvgPool1d(3, 2, padding=1), (2, 7)),
    ("average-3d", nn.AvgPool3d((1, 2, 2)), (1, 2, 4, 4)),
    ("adaptive", nn.AdaptiveAvgPool2d((3, 2)), (2, 5, 7)),
    ("global", nn.AdaptiveAvgPool2d(1), (2, 5, 7)),
]


@pytest.mark.parametrize(("name", "layer", "shape"), LINEAR, ids=[case[0] for case in LINEAR])
def test_linear_layers_are_their_matrices(name: str, layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Between two dense layers, J and the dense layers' κ are those of the chain with the layer as a matrix."""
    layer = copy.deepcopy(layer).double()
    matrix = unrolled(layer, shape).detach()
    torch.manual_seed(0)
    first, last = nn.Linear(4, matrix.shape[1]).double(), nn.Linear(matrix.shape[0], 3).double()
    model = nn.Sequential(first, nn.ReLU(), nn.Unflatten(1, shape), layer, nn.ReLU(), nn.Flatten(), last)
    weights, biases = [first.weight, matrix, last.weight], [first.bias, None, last.bias]
    weights = [weight.detach() for weight in weights]
    total, (of_first, of_last) = path_sums(model, [(1, 4)], [first.weight, last.weight])
    torch.testing.assert_close(total.sqrt(), reference.path_norm(weights, biases))
    right = reference.kappas(weights, biases)[0]
    torch.testing.assert_close(of_first, right[0])
    torch.testing.assert_close(of_last, right[2])


def test_a_shared_weight_has_the_sum_over_its_places() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    shape = (2, 4, 5)
    last = nn.Linear(3 * 20, 2).double()
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), last)
    weights = [unrolled(conv, shape).detach(), last.weight.detach()]
    dense = reference.kappas(weights, [None, last.bias.detach()])[0][0]
    found = kappas(model, (1, *shape))["0.weight"]
    for index in range(conv.weight.numel()):
        single = copy.deepcopy(conv)
        with torch.no_grad():
            single.weight.zero_().view(-1)[index] = 1
        places = unrolled(single, shape).detach() != 0
        torch.testing.assert_close(found.view(-1)[index], dense[places].sum())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.MaxPool2d(3, 2, padding=1), (2, 6, 7)),
        (nn.MaxPool2d(2, ceil_mode=True), (1, 5, 5)),
        (nn.MaxPool1d(3, 2, padding=1), (2, 7)),
        (nn.MaxPool3d((1, 2, 2)), (1, 2, 4, 4)),
        (nn.AdaptiveMaxPool2d((3, 2)), (2, 5, 7)),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else None,
)
def test_a_maximum_counts_the_paths_through_its_window(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """An entry has a path to an output if a large value there becomes the output."""
    size = torch.Size(shape).numel()
    matrix = unrolled(layer, shape)  # zeros elsewhere: 1 where the entry is in the window
    first = nn.Linear(3, size, bias=False).double()
    model = nn.Sequential(first, nn.Unflatten(1, shape), layer)
    right = reference.kappas([first.weight.detach(), (matrix > 0).double()], [None, None])[0][0]
    torch.testing.assert_close(kappas(model, (1, 3))["0.weight"], right)


class Residual(nn.Module):
    """What plain networks of their own classes do."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.tensor([2.0, 3.0, 0.5]))
        self.shift = nn.Parameter(torch.tensor([1.0, -1.0, 0.0]))
        self.register_buffer("mask", torch.tensor([1.0, -2.0, 1.0]))
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        y = self.two(F.dropout(F.relu(self.one(x)), 0.3, self.training)) * self.gain.view(1, -1) * self.mask
        if self.inplace:
            y += identity
            y.mul_(0.5)
        else:
            y = 0.5 * (y + identity)
        y = torch.cat([y + self.shift, x.float() - y], 1)
        return y.mean(1, keepdim=True) if self.training else y.sum(1, keepdim=True) / 6


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_residual_sums_scales_and_slices(inplace: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = Residual(inplace).train(training)
    one, two = model.one.weight.detach().double().square(), model.two.weight.detach().double().square()
    ones = torch.ones(3, dtype=torch.float64)
    factors = model.gain.detach().double().square() * model.mask.double().square() / 4
    inner = one @ ones + model.one.bias.detach().double().square()
    branch = (two @ inner + model.two.bias.detach().double().square()) * factors + ones / 4
    # y is at both outputs, the shift at one and the input at the other
    total = (2 * branch + model.shift.detach().double().square() + ones).sum() / 36
    torch.testing.assert_close(path_sums(model, [(2, 3)], [])[0], total)
    found = kappas(model, (2, 3))
    torch.testing.assert_close(found["two.weight"], torch.outer(2 * factors / 36, inner))
    torch.testing.assert_close(found["one.bias"], two.t() @ (2 * factors / 36))
    torch.testing.assert_close(found["shift"], ones / 36)


def test_dropouts_are_as_in_evaluation() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.ReLU(), BatchwiseDropout(0.5), nn.Linear(5, 2)]
    plain = kappas(nn.Sequential(layers[0], layers[3]), (1, 6))
    for model in (nn.Sequential(*layers), SubmatrixSequential(*layers, mode="submatrix")):
        for kappa, right in zip(kappas(model, (1, 6)).values(), plain.values(), strict=True):
            torch.testing.assert_close(kappa, right)
        assert all(module.training for module in model.modules())
    drop_path = nn.Sequential(layers[0], DropPath(nn.Linear(5, 5), 0.9), layers[3])
    with torch.no_grad():
        for parameter in drop_path[1].parameters():
            parameter.zero_()
    torch.testing.assert_close(kappas(drop_path, (1, 6))["0.weight"], plain["0.weight"])


def test_compiled_parts_run_as_written() -> None:
    eager = mlp(3, 4, 2, between=nn.Dropout)
    compiled = nn.Sequential(torch.compile(copy.deepcopy(eager[:2]), backend="eager"), copy.deepcopy(eager[2]))
    compiled[1].compile(backend="eager")
    for kappa, right in zip(kappas(compiled, (1, 3)).values(), kappas(eager, (1, 3)).values(), strict=True):
        torch.testing.assert_close(kappa, right)


class Written(nn.Module):
    """Like a function that users write around one layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


FIXED: list[tuple[str, Any, list[float]]] = [
    ("number", lambda y: 3 * y, [9.0] * 3),
    ("integers", lambda y: y * torch.tensor([1, 2, -3]), [1.0, 4.0, 9.0]),
    ("negative", lambda y: torch.tensor([1, 0, 2]) - y / 2, [0.25] * 3),
    ("alpha", lambda y: torch.sub(torch.zeros_like(y), y, alpha=3), [9.0] * 3),
    ("in-place", lambda y: y.relu_().neg_().mul_(2), [4.0] * 3),
    ("augmented", lambda y: operator.iadd(y.clone(), y), [2.0] * 3),
    ("parts", lambda y: torch.stack([c + c for c in y.t()], 1), [2.0] * 3),
    ("twice", lambda y: torch.cat([*y.split(1, 1), y], 1), [2.0] * 3),
    ("keywords", lambda y: F.leaky_relu(input=y, negative_slope=0.2), [1.0] * 3),
    ("zeros", lambda y: torch.cat([y, torch.zeros(y.shape[0], 2)], dim=1) + 0, [1.0] * 3),
    ("flipped", lambda y: y.flip(1)[:, :2], [0.0, 1.0, 1.0]),
    ("circular", lambda y: F.pad(y.unsqueeze(1), (1, 1), mode="circular"), [2.0, 1.0, 2.0]),
]


@pytest.mark.parametrize(("name", "function", "expected"), FIXED, ids=[case[0] for case in FIXED])
def test_fixed_coefficients_count_squared(name: str, function: Any, expected: list[float]) -> None:
    """κ of the layer's bias is γ_out of its units: what the function makes of them."""
    found = kappas(Written(function), (2, 3))["layer.bias"]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


class Tied(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.one = layer
        self.two = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


def test_tied_layers_have_the_sum_over_both() -> None:
    layer = nn.Linear(3, 3).double()
    weights, biases = [layer.weight.detach()] * 2, [layer.bias.detach()] * 2
    of_weights, of_biases = reference.kappas(weights, biases)
    found = kappas(Tied(layer), (1, 3))
    torch.testing.assert_close(found["one.weight"], of_weights[0] + of_weights[1])
    assert of_biases[0] is not None
    assert of_biases[1] is not None
    torch.testing.assert_close(found["one.bias"], of_biases[0] + of_biases[1])


def test_several_inputs_and_unused_parameters() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.unused = nn.Linear(2, 3), nn.Linear(4, 3), nn.Linear(1, 1)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.one(x) + self.two(z)

    model = Two()
    found = path_sums(model, [(5, 2), (5, 4)], list(model.parameters()))[1]
    assert [kappa.unique().tolist() for kappa in found] == [[1.0]] * 4 + [[0.0]] * 2


def test_leaves_the_model_and_random_numbers_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.inference_mode():
        path_sums(model, [(1, 3)], [model[3].weight])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


class Doubled(torch.autograd.Function):
    """A backward pass of its own need not fit the squares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.other = nn.Parameter(torch.ones(3, 3))
        self.constant = torch.ones(3, 3)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


REFUSED: list[tuple[str, Any, str]] = [
    ("norm", nn.BatchNorm1d(3), r"1 \(BatchNorm1d\) uses batch_norm: it divides by a statistic"),
    ("norm-eval", nn.BatchNorm1d(3).eval(), "uses batch_norm"),
    ("layer-norm", nn.LayerNorm(3), "uses layer_norm"),
    ("sigmoid", nn.Sigmoid(), r"1 \(Sigmoid\) uses sigmoid: it is not positively homogeneous"),
    ("tanh", nn.Tanh(), "uses tanh"),
    ("gelu", nn.GELU(), "uses gelu"),
    ("softmax", nn.Softmax(1), "leave it to the loss"),
    ("prelu", nn.PReLU(), "use LeakyReLU"),
    ("factored", FactoredLinear(3, 3), r"1 \(FactoredLinear\) computes a weight by"),
    ("weight-norm", nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "computes a weight by|uses _?weight_norm"),
    ("pool-indices", nn.Sequential(nn.Unflatten(1, (1, 3)), nn.MaxPool1d(2, dilation=2)), r"1\.1 \(MaxPool1d\)"),
    ("unknown", Function(lambda m, x: torch.special.erf(x)), "uses special_erf|uses erf"),
    ("gate", Function(lambda m, x: x * x), "uses mul on two values"),
    ("attention", Function(lambda m, x: x @ x.t()), "uses matmul on two values"),
    ("weights-sum", Function(lambda m, x: F.linear(x, m.weight + m.other)), "computes a weight by add"),
    ("constant", Function(lambda m, x: x @ m.constant), "no parameter or buffer and not from the input; register it"),
    ("noise", Function(lambda m, x: x + torch.rand(3)), "no parameter or buffer"),
    ("data", Function(lambda m, x: F.linear(x.data, m.weight)), "uses data"),
    ("divide", Function(lambda m, x: x / m.weight[0]), "divides by a tensor"),
    ("pad", Function(lambda m, x: F.pad(x, (1, 1), value=2.0)), "pads with 2.0"),
    ("write", Function(lambda m, x: m.weight.mul_(2)), "in place"),
    ("no-grad", Function(lambda m, x: torch.no_grad()(F.linear)(x, m.weight)), "computes linear without gradients"),
    ("function", Function(lambda m, x: Doubled.apply(x @ m.weight)), "an autograd function of its own"),
    ("branch", Function(lambda m, x: x if x.sum() > 0 else -x), "uses gt"),
    ("detach", Function(lambda m, x: x @ m.weight + x.detach()), "uses detach"),
    ("complex", nn.Linear(3, 3, dtype=torch.complex64), "complex parameters"),
    ("tuple", Function(lambda m, x: (x, x)), "the model returned tuple"),
    ("no-input", Function(lambda m, x: m.weight), "computed from its input"),
]


@pytest.mark.parametrize(("name", "layer", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_has_no_path_norm_is_refused(name: str, layer: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        path_sums(model, [(4, 3)], [])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
