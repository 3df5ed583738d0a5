"""`to_batchwise_dropout`: the right places, the same objects, verified."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchlab
from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from batchlab.optim import SubmatrixSGD
from batchlab.surgery import to_batchwise_dropout
from tests.surgery.dropout_networks import IMAGES, ROWS, Net, assert_same, names, perceptron, snapshot, vgg


def test_root_becomes_a_submatrix_sequential(quiet):
    model = perceptron()
    assert to_batchwise_dropout(model, ROWS) is model
    assert type(model) is SubmatrixSequential
    assert names(model) == ["Linear", "ReLU", "BatchwiseDropout", "Linear"]
    assert "leaves out rows of 0 and columns of 3" in repr(model)


def test_chain_of_convolutions(quiet):
    model = vgg()
    parts, parameters = list(model), list(model.parameters())
    to_batchwise_dropout(model, IMAGES)
    assert all(new is old for new, old in zip(model, parts, strict=True))
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert [type(model[i]) for i in (4, 9, 13)] == [BatchwiseDropout] * 3
    assert [(model[i].p, model[i].dim) for i in (4, 9, 13)] == [(0.25, 1), (0.5, 1), (0.5, 1)]
    for line in ("4 leaves out rows of 0 and columns of 5", "9 leaves out rows of 5 and columns of 11", "13 leaves"):
        assert f"dropout {line}" in repr(model)


def masked_by_hand(model, x):
    """The stock chain, with the patterns that the converted one kept as masks."""
    for module in model:
        if isinstance(module, BatchwiseDropout):
            mask = torch.zeros(x.shape[1], dtype=x.dtype)
            mask[module.kept] = x.shape[1] / len(module.kept)
            x = x * mask.view(1, -1, *[1] * (x.ndim - 2))
        else:
            x = module(x)
    return x


@pytest.mark.parametrize("mode", ["submatrix", "mask", "auto"])
def test_converted_is_the_masked_network(mode):
    model = to_batchwise_dropout(vgg().double(), IMAGES.double(), mode=mode)
    assert model.mode == mode
    assert len(model[4].kept if model[4].kept is not None else ()) == 0  # the check ran on copies
    x = IMAGES.double().requires_grad_()
    sources = [x, *model.parameters()]
    y = model(x)
    expected = masked_by_hand(model, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(y)
    for ours, masked in zip(
        torch.autograd.grad(y, sources, weights), torch.autograd.grad(expected, sources, weights), strict=True
    ):
        torch.testing.assert_close(ours, masked, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [perceptron, vgg])
def test_evaluation_is_bitwise_as_before(make):
    model = make().eval()
    x = ROWS if make is perceptron else IMAGES
    expected = model(x)
    assert torch.equal(to_batchwise_dropout(model, x)(x), expected)


def test_options_reach_the_layers():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    model = to_batchwise_dropout(perceptron(), ROWS, exact=False, mode="mask", generator=generator)
    assert (model.mode, model[2].exact, model[2].generator) == ("mask", False, generator)
    assert torch.equal(generator.get_state(), state)
    torch.manual_seed(1)
    first = model(ROWS)
    generator.set_state(state)
    torch.manual_seed(2)
    assert torch.equal(model(ROWS), first)


@pytest.mark.parametrize("p", [0, 0.0, 0.1, 0.5, 0.95, 1.0])
def test_rate_is_kept(p, quiet):
    model = to_batchwise_dropout(perceptron(p), ROWS)
    assert model[2].p == p
    assert model(ROWS).isfinite().all()


def test_inplace_dropout(quiet):
    model = to_batchwise_dropout(perceptron(inplace=True), ROWS)
    assert type(model[2]) is BatchwiseDropout
    assert not hasattr(model[2], "inplace")


def test_first_dropout_leaves_out_inputs(quiet):
    model = to_batchwise_dropout(nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), ROWS)
    assert "dropout 0 leaves out columns of 1" in repr(model)


@pytest.mark.parametrize(
    ("dropout", "convolution", "shape"),
    [
        (nn.Dropout1d(), nn.Conv1d(4, 6, 3), (3, 4, 7)),
        (nn.Dropout2d(), nn.Conv2d(4, 6, 3), (3, 4, 7, 7)),
        (nn.Dropout3d(), nn.Conv3d(4, 6, 3), (3, 4, 5, 5, 5)),
        (nn.Dropout(), nn.Conv1d(4, 6, 3), (3, 4, 7)),
        (nn.Dropout(), nn.Conv2d(4, 6, 3), (3, 4, 7, 7)),
        (nn.Dropout(), nn.Conv3d(4, 6, 3), (3, 4, 5, 5, 5)),
    ],
)
def test_feature_maps(dropout, convolution, shape, quiet):
    model = nn.Sequential(copy.deepcopy(convolution), nn.GELU(), copy.deepcopy(dropout), nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(shape))
    to_batchwise_dropout(model, torch.randn(shape))
    assert model[2].dim == 1
    assert "dropout 2 leaves out rows of 0 and columns of 4" in repr(model)


def test_nested_sequentials_are_part_of_the_outermost(quiet):
    inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Dropout(0.5)))
    model = nn.Sequential(inner, nn.Linear(8, 4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 2))
    to_batchwise_dropout(model, ROWS)
    assert [type(m) for m in (model, inner, inner[2])] == [SubmatrixSequential, nn.Sequential, nn.Sequential]
    assert "dropout 0.2.0 leaves out rows of 0.0 and columns of 1" in repr(model)


def test_sequentials_inside_of_a_module(quiet):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 6))

        def forward(self, x):
            return x + self.body(x)

    model = nn.Sequential(Residual(), nn.ModuleList([Residual()])[0], nn.Sequential(nn.Linear(6, 2)))
    to_batchwise_dropout(model, ROWS)
    assert type(model) is nn.Sequential  # it has no dropout of its own
    assert [type(model[i].body) for i in (0, 1)] == [SubmatrixSequential] * 2


def test_two_sequentials_with_a_forward_between(quiet):
    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))

    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout2d(), nn.Conv2d(8, 4, 3))
    classifier = nn.Sequential(nn.Dropout(), nn.Linear(64, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 3))
    model = to_batchwise_dropout(Net(forward, features=features, classifier=classifier), IMAGES)
    assert type(model.features) is type(model.classifier) is SubmatrixSequential
    assert model.features is features  # whoever else holds it has the converted one


def test_sequential_without_dropout_stays(quiet):
    model = Net(lambda self, x: self.b(self.a(x)), a=nn.Sequential(nn.Linear(6, 6), nn.ReLU()), b=perceptron())
    to_batchwise_dropout(model, ROWS)
    assert type(model.a) is nn.Sequential
    assert type(model.b) is SubmatrixSequential


def test_named_layers_keep_their_names(quiet):
    model = nn.Sequential(OrderedDict(fc=nn.Linear(6, 8), act=nn.ReLU(), drop=nn.Dropout(), out=nn.Linear(8, 2)))
    to_batchwise_dropout(model, ROWS)
    assert [name for name, _ in model.named_children()] == ["fc", "act", "drop", "out"]
    assert type(model.drop) is BatchwiseDropout


# --- what stays ----------------------------------------------------------------------------------------------------


def test_keys_and_checkpoints_both_ways():
    stock, model = vgg(), to_batchwise_dropout(vgg(), IMAGES)
    assert list(stock.state_dict()) == list(model.state_dict())
    model.load_state_dict(stock.state_dict())
    assert torch.equal(model.eval()(IMAGES), stock.eval()(IMAGES))
    stock.load_state_dict(to_batchwise_dropout(vgg(), IMAGES).state_dict())


def test_pickle_and_deepcopy():
    model = to_batchwise_dropout(perceptron(), ROWS, mode="submatrix")
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again) is SubmatrixSequential
        torch.manual_seed(1)
        y = again(ROWS)
        torch.manual_seed(1)
        assert torch.equal(y, model(ROWS))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)[2].p == 0.5


def test_everything_but_types_is_kept():
    model = vgg()
    model(IMAGES).sum().backward()
    model[5].weight.requires_grad_(False)
    model[1].eval()
    model[4].eval()
    before = snapshot(model)
    state = torch.get_rng_state()
    to_batchwise_dropout(model, IMAGES)
    after = snapshot(model)
    for old, new in zip(before[0], after[0], strict=True):
        assert (old[0], old[1], old[3]) == (new[0], new[1], new[3])
    assert before[1:3] == after[1:3]
    assert all(torch.equal(value, after[4][name]) for name, value in before[4].items())
    assert all(torch.equal(value, after[5][name]) for name, value in before[5].items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model[4].kept is None


@pytest.mark.parametrize("mode", [True, False])
def test_mode_is_kept(mode):
    model = to_batchwise_dropout(vgg().train(mode), IMAGES)
    assert all(module.training is mode for module in model.modules())


def test_twice_is_once(quiet):
    model = Net(lambda self, x: self.b(self.a(x)), a=nn.Sequential(nn.Linear(6, 6), nn.ReLU()), b=perceptron())
    to_batchwise_dropout(model, ROWS, mode="mask")
    before = snapshot(model)
    assert to_batchwise_dropout(model, ROWS, mode="submatrix", exact=False) is model
    assert_same(before, model)
    assert (model.b.mode, model.b[2].exact) == ("mask", True)


def test_masks_are_reported_once():
    model = Net(lambda self, x: self.b(self.drop(self.a(x))), a=nn.Linear(6, 4), drop=nn.Dropout(), b=nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="only mask"):
        to_batchwise_dropout(model, ROWS)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_batchwise_dropout(model, ROWS)
    assert_same(before, model)


def test_batchwise_dropouts_by_hand_get_their_container(quiet):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), BatchwiseDropout(0.5, exact=False), nn.Linear(8, 2))
    to_batchwise_dropout(model, ROWS)
    assert type(model) is SubmatrixSequential
    assert model[2].exact is False


def test_shared_modules_are_converted_once_everywhere(quiet):
    drop, block = nn.Dropout(0.5), perceptron()
    model = Net(
        lambda self, x: self.again(x) + self.block(x) + self.one(x),
        block=block,
        again=block,
        one=nn.Sequential(nn.Linear(6, 5), drop, nn.Linear(5, 5), drop, nn.Linear(5, 3)),
    )
    model.held = [drop]  # not registered
    to_batchwise_dropout(model, ROWS)
    assert model.again is model.block is block
    assert type(block) is SubmatrixSequential
    assert model.one[1] is model.one[3] is model.held[0] is drop
    assert type(drop) is BatchwiseDropout
    assert model(ROWS).shape == (5, 3)


def test_shared_sequential_inside_and_outside_of_another(quiet):
    block = perceptron()
    model = Net(lambda self, x: self.block(x) + self.outer(x), outer=nn.Sequential(block, nn.Linear(3, 3)), block=block)
    to_batchwise_dropout(model, ROWS, mode="submatrix")
    assert type(model.block) is SubmatrixSequential
    assert model(ROWS).shape == (5, 3)


def test_hooks_stay_and_run():
    model = perceptron()
    seen = []
    handle = model.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    model[2].register_forward_hook(lambda module, args, y: seen.append(type(module)))
    with pytest.warns(UserWarning, match="Dropout '2': it has hooks"):
        to_batchwise_dropout(model, ROWS)
    assert (type(model), type(model[2])) == (nn.Sequential, BatchwiseDropout)
    seen.clear()
    model(ROWS)
    assert seen == [BatchwiseDropout, nn.Sequential]
    handle.remove()
    model = perceptron()
    handle = model.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    to_batchwise_dropout(model, ROWS)
    seen.clear()
    model(ROWS)
    handle.remove()
    model(ROWS)
    assert seen == [SubmatrixSequential]


def test_inner_sequential_with_a_hook_is_one_of_its_own(quiet):
    inner = perceptron()
    inner.register_forward_hook(lambda module, args, y: None)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(), inner)
    to_batchwise_dropout(model, ROWS)
    assert type(model) is type(inner) is SubmatrixSequential


# --- where the features are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "place", "shape", "dim"),
    [
        ([nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)], 2, (4, 5, 6), -1),
        ([nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)], 2, (4, 3, 5, 6), -1),
        ([nn.Dropout(), nn.Linear(6, 2)], 0, (4, 5, 6), -1),
        ([nn.LayerNorm(6), nn.Dropout(), nn.Linear(6, 2)], 1, (4, 5, 6), -1),
        ([nn.Dropout(), nn.Conv1d(6, 4, 3)], 0, (4, 6, 5), 1),
        (
            [nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Dropout(), nn.Linear(3, 2)],
            4,
            (4, 6, 8),
            1,
        ),
        ([nn.Linear(6, 8), nn.Identity(), nn.Dropout(), nn.Dropout(0.1), nn.Linear(8, 2)], 2, (4, 5, 6), -1),
        ([nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2)], 1, (2, 3, 8, 8), 1),
    ],
)
def test_neighbours_tell(layers, place, shape, dim):
    model = nn.Sequential(*copy.deepcopy(layers))
    to_batchwise_dropout(model, torch.randn(shape))
    assert type(model) is SubmatrixSequential
    assert model[place].dim == dim


def test_functions_and_additions_are_seen_through():
    def forward(self, x):
        y = F.gelu(self.fc(x)) + self.skip(x)
        return self.out(self.drop(y))

    model = Net(forward, fc=nn.Linear(6, 8), skip=nn.Linear(6, 8), drop=nn.Dropout(), out=nn.Linear(8, 2))
    with pytest.warns(UserWarning, match="only mask"):
        to_batchwise_dropout(model, torch.randn(4, 5, 6))
    assert model.drop.dim == -1


def test_recurrent_and_embedded():
    def forward(self, x):
        y, _ = self.lstm(self.drop1(self.embed(x)))
        return self.out(self.drop2(y))

    layers = {"embed": nn.Embedding(9, 6), "lstm": nn.LSTM(6, 5, batch_first=True), "out": nn.Linear(5, 2)}
    model = Net(forward, **layers, drop1=nn.Dropout(), drop2=nn.Dropout())
    with pytest.warns(UserWarning, match="only mask"):
        to_batchwise_dropout(model, torch.randint(9, (4, 7)))
    assert (model.drop1.dim, model.drop2.dim) == (-1, -1)


def test_chain_in_a_model_that_cannot_be_traced(quiet):
    def forward(self, x):
        return self.body(x) if x.sum() > -1e9 else x

    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 6))
    model = to_batchwise_dropout(Net(forward, body=body), torch.randn(4, 5, 6))
    assert model.body[2].dim == -1
    assert type(model.body) is SubmatrixSequential


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, quiet):
    model = vgg().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    to_batchwise_dropout(model, IMAGES.to(dtype))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model(IMAGES.to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_that_runs_in_its_own_dtype_only(dtype, quiet):
    fixed = torch.randn(6, 6).to(dtype)

    class Fixed(nn.Module):
        def forward(self, x):
            return x @ fixed

    model = to_batchwise_dropout(nn.Sequential(Fixed(), *perceptron()).to(dtype), ROWS.to(dtype))
    assert type(model) is SubmatrixSequential


def test_float32_inside_of_a_float64_copy(quiet):
    class Narrow(nn.Module):
        def forward(self, x):
            return (x.float() * 1.1).to(x.dtype)

    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(), nn.Linear(16, 6), Narrow(), nn.Linear(6, 8), nn.Dropout())
    to_batchwise_dropout(model, ROWS)


def test_rounding_that_the_model_amplifies_is_no_difference(quiet):
    model = Net(lambda self, x: torch.sin(1e7 * self.body(x)), body=perceptron())
    to_batchwise_dropout(model, ROWS)
    assert type(model.body) is SubmatrixSequential


def test_frozen_and_untrainable(quiet):
    model = vgg().requires_grad_(False)
    to_batchwise_dropout(model, IMAGES)
    assert not any(p.requires_grad for p in model.parameters())


def test_batch_of_one(quiet):
    to_batchwise_dropout(perceptron(), ROWS[:1])
    with pytest.raises(ValueError, match="training mode"):
        to_batchwise_dropout(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout()), ROWS[:1])


def test_channels_last_and_batchlabs_norm(quiet):
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), batchlab.nn.BatchNorm2d(6), nn.PReLU(6), nn.Dropout2d()),
        *(nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    ).to(memory_format=torch.channels_last)
    to_batchwise_dropout(model, IMAGES.to(memory_format=torch.channels_last))
    assert "dropout 3 leaves out rows of 0 and columns of 4" in repr(model)


def test_several_inputs_and_outputs(quiet):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.shift = perceptron(), nn.Parameter(torch.zeros(3))

        def forward(self, x, y, scale=1, flag=None):
            x += 1  # writes into its input
            return {"sum": self.body(x) * scale + self.shift, "pair": (self.body(y), torch.arange(3)), "none": flag}

    x = ROWS.clone()
    for example in ((x, x), (x, x, 2), {"x": x, "y": x, "flag": "on"}):
        model = to_batchwise_dropout(Two(), example)
        assert type(model.body) is SubmatrixSequential
    assert torch.equal(x, ROWS)


def test_auxiliary_head_of_training(quiet):
    def forward(self, x):
        return (self.head(x), self.aux(x)) if self.training else self.head(x)

    model = Net(forward, head=nn.Linear(6, 2), aux=perceptron()).eval()
    to_batchwise_dropout(model, ROWS)
    assert type(model.aux) is SubmatrixSequential


def test_noise_elsewhere_does_not_disturb(quiet):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.calls = perceptron(), 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen.add_(1)
            return self.body(x + torch.rand_like(x) * self.calls)

    model = to_batchwise_dropout(Noisy(), ROWS)
    assert (model.calls, model.seen) == (0, 0)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, SubmatrixSGD])
def test_training_goes_on_with_the_optimizer_that_was_there(optimizer):
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    labels = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    steps = optimizer(model.parameters(), lr=0.1, momentum=0.9)
    to_batchwise_dropout(model, x, mode="submatrix")
    before = F.cross_entropy(model.eval()(x), labels)
    model.train()
    for _ in range(40):
        steps.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        steps.step()
    assert F.cross_entropy(model.eval()(x), labels) < 0.3 * before
