"""`insert_batch_norm`: the right places, nothing else changed, and nothing at all changed when it fails."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchlab
from batchlab.surgery import insert_batch_norm


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def names(model):
    return [type(child).__name__ for child in model]


def snapshot(model):
    """Everything a failed insertion must leave: structure, objects, values, modes."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, id(b)) for name, b in model.named_buffers()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_same(before, model):
    after = snapshot(model)
    assert before[:3] == after[:3]
    assert before[3].keys() == after[3].keys()
    assert all(torch.equal(value, after[3][name]) for name, value in before[3].items())


class Net(nn.Module):
    """Layers by name, and a forward given as a function of (self, x)."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self._forward(self, x)


def test_sequential_gets_the_normalization_between_layer_and_nonlinearity():
    model = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    weights = [p for p in model.parameters() if p.ndim == 2]
    last_bias = model[4].bias
    assert insert_batch_norm(model) is model
    assert names(model) == ["Linear", "BatchNorm1d", "Sigmoid", "Linear", "BatchNorm1d", "Tanh", "Linear"]
    assert type(model[1]) is batchlab.nn.BatchNorm1d
    assert model[0].bias is None
    assert model[3].bias is None
    assert model[6].bias is last_bias
    assert [id(p) for p in model.parameters() if p.ndim == 2] == [id(p) for p in weights]
    assert "0.bias" not in model.state_dict()


def test_output_is_that_of_the_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)).double()
    first, last = model[0], model[2]
    insert_batch_norm(model, eps=0.5)
    x = torch.randn(7, 5, dtype=torch.float64)
    u = x @ first.weight.T
    normalized = (u - u.mean(0)) / (u.var(0, unbiased=False) + 0.5).sqrt()
    torch.testing.assert_close(model(x), torch.sigmoid(normalized) @ last.weight.T + last.bias)


def test_options_reach_the_layer():
    model = insert_batch_norm(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), eps=0.25, momentum=None)
    assert (model[1].eps, model[1].momentum, model[1].num_features) == (0.25, None, 3)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(4, 6), batchlab.nn.BatchNorm1d, (3, 4)),
        (nn.Conv1d(4, 6, 3), batchlab.nn.BatchNorm1d, (3, 4, 7)),
        (nn.Conv2d(4, 6, 3, groups=2), batchlab.nn.BatchNorm2d, (3, 4, 7, 7)),
        (nn.Conv3d(4, 6, 3), batchlab.nn.BatchNorm3d, (3, 4, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3), batchlab.nn.BatchNorm1d, (3, 4, 7)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), batchlab.nn.BatchNorm2d, (3, 4, 5, 5)),
        (nn.ConvTranspose3d(4, 6, 3), batchlab.nn.BatchNorm3d, (3, 4, 3, 3, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_layer_gets_the_norm_of_its_dimensions(layer, norm, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    model = insert_batch_norm(nn.Sequential(copy.deepcopy(layer).to(dtype), nn.ReLU()), x)
    assert type(model[1]) is norm
    assert model[1].num_features == 6
    assert model[1].weight.dtype == dtype
    assert model[1].running_var.dtype == torch.promote_types(dtype, torch.float32)
    assert model(x).dtype == dtype
    statistics = model[0](x).detach().float().transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(model[1].running_mean.float(), 0.1 * statistics, rtol=1e-2, atol=1e-3)


ACTIVATIONS = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.sigmoid": F.sigmoid,
    "torch.sigmoid": torch.sigmoid,
    "x.sigmoid()": lambda x: x.sigmoid(),
    "torch.tanh": torch.tanh,
    "F.tanh": F.tanh,
    "F.silu": F.silu,
    "F.gelu": F.gelu,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "F.elu": F.elu,
    "F.softplus": F.softplus,
    "F.hardswish": F.hardswish,
    "keyword": lambda x: F.relu(input=x),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_and_methods_are_nonlinearities(name):
    act = ACTIVATIONS[name]
    model = Net(lambda self, x: self.fc2(act(self.fc1(x))), fc1=nn.Linear(4, 3), fc2=nn.Linear(3, 2))
    insert_batch_norm(model, torch.randn(5, 4))
    assert names(model.fc1) == ["Linear", "BatchNorm1d"]
    assert model.fc1[0].bias is None
    assert type(model.fc2) is nn.Linear
    assert model.fc2.bias is not None


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.Softplus()],
    ids=lambda m: type(m).__name__,
)
def test_modules_are_nonlinearities(activation):
    model = insert_batch_norm(nn.Sequential(nn.Linear(4, 3), copy.deepcopy(activation)))
    assert names(model) == ["Linear", "BatchNorm1d", type(activation).__name__]


@pytest.mark.parametrize("other", [nn.Softmax(1), nn.LogSoftmax(1), nn.Dropout(), nn.Identity()])
def test_softmax_and_dropout_are_not(other):
    model = nn.Sequential(nn.Linear(4, 3), other)
    with pytest.raises(ValueError, match="no nonlinearity"):
        insert_batch_norm(model)
    assert names(model) == ["Linear", type(other).__name__]


def test_twice_is_once():
    def forward(self, x):
        return self.head(torch.relu(self.fc(self.body(x))))

    body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    model = Net(forward, body=body, fc=nn.Linear(4, 3), head=nn.Linear(3, 2))
    insert_batch_norm(model)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert insert_batch_norm(model, torch.randn(3, 4)) is model
    assert_same(before, model)


def test_what_is_normalized_already_stays():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.1), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    insert_batch_norm(model)
    assert names(model) == [*["Linear", "BatchNorm1d", "Dropout", "ReLU"], *["Linear", "BatchNorm1d", "ReLU"]]
    fused = nn.Sequential(nn.Linear(4, 3), batchlab.nn.BatchNorm1d(3, activation="relu"), nn.Linear(3, 2))
    before = snapshot(fused)
    insert_batch_norm(fused)
    assert_same(before, fused)


class Block(nn.Module):
    """A residual block without normalization: the second relu follows an addition."""

    def __init__(self, width, act):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.act = act

    def forward(self, x):
        return self.act(x + self.conv2(self.act(self.conv1(x))))


def test_what_cannot_be_normalized_is_left_with_one_warning():
    relu = nn.ReLU(inplace=True)  # one object, used everywhere, as in torchvision
    model = nn.Sequential(nn.Conv2d(3, 4, 3), relu, Block(4, relu), Block(4, relu))
    with pytest.warns(UserWarning, match="left 2 nonlinearities") as caught:
        insert_batch_norm(model, torch.randn(2, 3, 8, 8))
    assert len(caught) == 1
    assert str(caught[0].message).count("comes from add()") == 2
    assert names(model) == ["Conv2d", "BatchNorm2d", "ReLU", "Block", "Block"]
    assert [names(model[i].conv1) for i in (3, 4)] == [["Conv2d", "BatchNorm2d"]] * 2
    assert type(model[3].conv2) is nn.Conv2d
    assert model[3].conv2.bias is not None
    assert model[3].act is model[4].act is relu


def reused(self, x):
    return torch.relu(self.fc(torch.relu(self.fc(x)))) + torch.tanh(self.ok(x))


def multi_consumer(self, x):
    y = self.fc(x)
    return torch.relu(y) + y + torch.tanh(self.ok(x))


def read_directly(self, x):
    return torch.relu(self.fc(x)) + self.fc.weight.sum() + torch.tanh(self.ok(x))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [(reused, "is called 2 times"), (multi_consumer, "is used 2 times"), (read_directly, "reads the parameters")],
)
def test_layers_that_something_else_needs_are_left(forward, reason):
    model = Net(forward, fc=nn.Linear(3, 3), ok=nn.Linear(3, 3))
    bias = model.fc.bias
    with pytest.warns(UserWarning, match=reason):
        insert_batch_norm(model, torch.randn(4, 3))
    assert type(model.fc) is nn.Linear
    assert model.fc.bias is bias
    assert names(model.ok) == ["Linear", "BatchNorm1d"]


def test_layer_under_two_names_is_left():
    model = Net(lambda self, x: torch.relu(self.a(x)) + torch.tanh(self.ok(x)), a=nn.Linear(3, 3), ok=nn.Linear(3, 3))
    model.b = model.a
    with pytest.warns(UserWarning, match="2 names"):
        insert_batch_norm(model)
    assert model.a is model.b


def test_example_shows_linear_layers_on_sequences():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(15, 2), nn.ReLU())
    with pytest.warns(UserWarning, match="input of 3 dimensions"):
        insert_batch_norm(model, torch.randn(6, 5, 4))
    assert names(model) == ["Linear", "ReLU", "Flatten", "Linear", "BatchNorm1d", "ReLU"]


def test_unbatched_example_is_left():
    with pytest.raises(ValueError, match="input of 3 dimensions"):
        insert_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(3, 8, 8))


def test_example_as_tuple_and_dict_and_defaults():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x, y, mask=None, flip=False):
            x = x if mask is None else x * mask
            return torch.relu(self.fc(-x if flip else x + y))

    x = torch.randn(4, 3)
    for example in (None, (x, x), (x, x, None, True), {"x": x, "y": x, "flip": True}, {"x": x, "y": x, "mask": x}):
        assert names(insert_batch_norm(Two(), example).fc) == ["Linear", "BatchNorm1d"]


def test_sequential_that_its_owner_iterates_over_keeps_its_numbers():
    def forward(self, x):
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i == 1:
                x = x * 2
        return x

    model = Net(forward, features=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU()))
    insert_batch_norm(model)
    assert names(model.features) == ["Sequential", "ReLU", "Sequential", "ReLU"]


def test_named_sequential_keeps_its_names():
    layers = OrderedDict(fc=nn.Linear(4, 3), act=nn.ReLU(), out=nn.Linear(3, 2))
    model = insert_batch_norm(nn.Sequential(layers))
    assert [name for name, _ in model.named_children()] == ["fc", "fc_norm", "act", "out"]
    assert model.out is layers["out"]


def test_identity_between_is_seen_through():
    model = insert_batch_norm(nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.ReLU()))
    assert names(model) == ["Sequential", "Identity", "ReLU"]
    assert names(model[0]) == ["Linear", "BatchNorm1d"]


def test_auxiliary_head_of_training_is_normalized_too():
    def forward(self, x):
        y = self.fc(x)
        return torch.relu(self.aux(x)) + y if self.training else y

    model = Net(forward, fc=nn.Linear(3, 2), aux=nn.Linear(3, 2)).eval()
    insert_batch_norm(model, torch.randn(4, 3))
    assert names(model.aux) == ["Linear", "BatchNorm1d"]


def test_modes_and_frozen_parts_are_kept():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    model[2].eval()
    model[0].weight.requires_grad_(False)
    insert_batch_norm(model)
    assert [m.training for m in model] == [True, True, True, False]
    assert [m.training for m in model[3]] == [False] * 3
    assert not model[0].weight.requires_grad


def test_example_run_leaves_random_state_buffers_and_modes():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, x):
            self.seen.add_(1)
            self.calls += 1
            return torch.relu(self.fc(x + torch.rand(3)))

    model = Noisy()
    state = torch.get_rng_state()
    insert_batch_norm(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.seen == 0
    assert model.calls == 0
    assert not [key for key in vars(model) if key.startswith("_tensor_constant")]
    assert names(model.fc) == ["Linear", "BatchNorm1d"]


def test_compound_leaves_and_untraceable_activations_are_left():
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(3, 3), Odd(), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="comes from Odd '1'"):
        insert_batch_norm(model)
    assert names(model) == ["Linear", "Odd", "ReLU", "Linear", "BatchNorm1d", "ReLU"]


def test_bias_of_an_unknown_subclass_stays():
    class Biased(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.bias.abs().sum()

    model = insert_batch_norm(nn.Sequential(Biased(3, 3), nn.ReLU()), torch.randn(4, 3))
    assert names(model) == ["Biased", "BatchNorm1d", "ReLU"]
    assert model[0].bias is not None


def test_parametrized_layer_keeps_its_parametrization():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    model = insert_batch_norm(nn.Sequential(layer, nn.ReLU()), torch.randn(4, 3))
    assert nn.utils.parametrize.is_parametrized(model[0], "weight")
    assert model[0].bias is None
    assert model(torch.randn(4, 3)).shape == (4, 3)


def test_weight_norm_of_old_is_no_obstacle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(layer, nn.ReLU())
    model(torch.randn(4, 3)).sum().backward()  # `weight` is now a tensor in a graph, which deepcopy refuses
    insert_batch_norm(model, torch.randn(4, 3))
    assert names(model) == ["Linear", "BatchNorm1d", "ReLU"]


# --- refusals ------------------------------------------------------------------------------------------------------


def data_dependent(self, x):
    return torch.relu(self.fc(x)) if x.sum() > 0 else x


def test_untraceable_model_is_an_error_with_the_way_out():
    model = Net(data_dependent, fc=nn.Linear(3, 3))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"cannot be traced.*submodules that are traceable"):
        insert_batch_norm(model, torch.randn(4, 3))
    assert_same(before, model)


def test_wrappers_are_refused_with_the_way_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(TypeError, match=r"pass model\.module"):
        insert_batch_norm(nn.DataParallel(model))
    with pytest.raises(TypeError, match=r"pass model\._orig_mod"):
        insert_batch_norm(torch.compile(model, backend="eager"))
    with pytest.raises(TypeError, match=r"model\.0\.module"):
        insert_batch_norm(nn.Sequential(nn.DataParallel(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(model)
    with pytest.raises(TypeError, match="Python model first"):
        insert_batch_norm(scripted)
    with pytest.raises(TypeError, match="needs a torch"):
        insert_batch_norm(torch.relu)
    with pytest.raises(ValueError, match="not initialized"):
        insert_batch_norm(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
    assert names(model) == ["Linear", "ReLU"]


@pytest.mark.parametrize("options", [{"eps": -1.0}, {"eps": float("nan")}, {"momentum": 2.0}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        insert_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), **options)


def asks_the_layer(self, x):
    return torch.relu(self.fc(x)) / self.fc.in_features


@pytest.mark.parametrize("example", [None, torch.randn(4, 3)])
def test_forward_that_needs_the_layer_itself_rolls_back(example):
    model = Net(asks_the_layer, fc=nn.Linear(3, 3), other=nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    before = snapshot(model)
    with pytest.raises(ValueError, match="in_features"):
        insert_batch_norm(model, example)
    assert_same(before, model)


def indexes_its_sequential(self, x):
    return self.body[1](self.body(x) - 1)  # runs well after a renumbering, and computes something else


def counts_its_layers(self, x):
    y = self.body(x)
    return y if len(self.body) == 3 else y * 2


@pytest.mark.parametrize("forward", [indexes_its_sequential, counts_its_layers])
def test_forward_that_counts_on_numbers_rolls_back(forward):
    model = Net(forward, body=nn.Sequential(nn.Linear(3, 3), nn.Softplus(), nn.Dropout()))
    before = snapshot(model)
    with pytest.raises(ValueError, match="looks at its own layers"):
        insert_batch_norm(model, torch.randn(4, 3))
    assert_same(before, model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_half_way_rolls_back(monkeypatch, error):
    import batchlab.surgery.insertion as insertion

    made = []
    real = insertion._norm_for

    def failing(*args):
        made.append(args)
        if len(made) == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(insertion, "_norm_for", failing)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3), nn.ReLU()
    )
    before = snapshot(model)
    with pytest.raises(error):
        insert_batch_norm(model)
    assert len(made) == 3
    assert_same(before, model)


def test_example_that_does_not_fit():
    with pytest.raises(ValueError, match="does not run on example_input"):
        insert_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 5))
