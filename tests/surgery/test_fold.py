"""`fold`: the folded copy against the model itself, on inputs that the fold never saw, and what it must refuse."""

from __future__ import annotations

import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import batchlab
from batchlab.surgery import ChannelPad, FoldReport, fold
from batchlab.surgery.copies import copy_model
from batchlab.surgery.verify import compare

LAYERS = {
    "linear": (nn.Linear, 0),
    "conv1d": (nn.Conv1d, 1),
    "conv2d": (nn.Conv2d, 2),
    "conv3d": (nn.Conv3d, 3),
    "conv_transpose1d": (nn.ConvTranspose1d, 1),
    "conv_transpose2d": (nn.ConvTranspose2d, 2),
    "conv_transpose3d": (nn.ConvTranspose3d, 3),
}
NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OUR_NORM = {
    0: batchlab.nn.BatchNorm1d,
    1: batchlab.nn.BatchNorm1d,
    2: batchlab.nn.BatchNorm2d,
    3: batchlab.nn.BatchNorm3d,
}
RTOL = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def trained(norm, seed=0):
    """Give a normalization weights and statistics that are not their defaults: negative γ, large means."""
    generator = torch.Generator().manual_seed(seed)
    for name, low, high in (("weight", -2, 2), ("bias", -1, 1), ("running_mean", -3, 3), ("running_var", 0.05, 4)):
        value = getattr(norm, name)
        if value is not None:
            value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
    return norm


def train_all(model):
    for i, module in enumerate(model.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            trained(module, i)
    return model


def values(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_untouched(before, model):
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@torch.no_grad()
def largest_error(model, folded, x):
    expected = copy.deepcopy(model).eval()(x)
    return ((folded(x) - expected).abs().max() / expected.abs().max()).item()


def actions(report):
    return {entry.norm: entry.action for entry in report.entries}


def assert_folds(model, x, *, where=None, fresh=None):
    """All of it folds, and agrees on an input that it was not verified on."""
    before = values(model)
    folded, report = fold(model, x)
    assert not report.refused, str(report)
    assert report.folded
    assert where is None or {entry.where for entry in report.folded} == {where}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype) if fresh is None else fresh
    assert largest_error(model, folded, fresh) <= RTOL[x.dtype], str(report)
    assert_untouched(before, model)
    return folded


def shape_of(spatial, channels, size):
    return (3, channels, *[size] * spatial)


def settings(kind, where):
    """Every combination that the layer allows."""
    spatial = LAYERS[kind][1]
    if spatial == 0:
        return [({"bias": bias}, affine) for bias, affine in itertools.product([True, False], repeat=2)]
    transposed = kind.startswith("conv_transpose")
    if transposed and where == "before":
        table = [{"kernel_size": 1, "groups": groups} for groups in (1, 2)]
    else:
        paddings = [(0, "zeros"), (2, "zeros")]
        if not transposed:
            paddings += [("same", "zeros"), ("valid", "zeros"), (1, "reflect"), (1, "replicate"), (2, "circular")]
        product = itertools.product((1, 2), (1, 2), (1, 2), (2, 3), paddings)
        table = [
            {"groups": g, "dilation": d, "stride": s, "kernel_size": k, "padding": p, "padding_mode": mode}
            for g, d, s, k, (p, mode) in product
            if not (p == "same" and s > 1)
        ]
        if spatial == 3:
            table = table[::3]  # the third dimension repeats what the second shows
    if spatial == 1:  # the cheapest has the full product; elsewhere bias and affine alternate
        return [({**row, "bias": b}, a) for row, b, a in itertools.product(table, (True, False), (True, False))]
    flags = itertools.cycle([(True, True), (False, True), (True, True), (False, False), (True, False)])
    return [({**row, "bias": bias}, affine) for row, (bias, affine) in zip(table, flags, strict=False)]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_setting_in_float64(kind, where):
    cls, spatial = LAYERS[kind]
    norms = itertools.cycle([NORM[spatial], OUR_NORM[spatial]])
    for row, affine in settings(kind, where):
        layer = cls(4, 6, **row)
        norm = trained(next(norms)(6 if where == "after" else 4, affine=affine))
        model = nn.Sequential(*((layer, norm) if where == "after" else (norm, layer))).double().train()
        x = torch.randn(shape_of(spatial, 4, 6), dtype=torch.float64)
        direction = "into the layer before" if where == "after" else "into the layer after"
        folded = assert_folds(model, x, where=direction)
        zeros = row.get("padding_mode") == "zeros" and row["padding"] not in (0, "valid")
        pads = where == "before" and zeros and not kind.startswith("conv_transpose")
        assert any(isinstance(m, ChannelPad) for m in folded.modules()) == pads, row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_dtype(kind, where, dtype):
    cls, spatial = LAYERS[kind]
    options = {} if spatial == 0 else {"kernel_size": 3, "padding": 1, "groups": 2}
    if kind.startswith("conv_transpose") and where == "before":
        options = {"kernel_size": 1, "groups": 2}
    layer, norm = cls(4, 6, **options), trained(OUR_NORM[spatial](6 if where == "after" else 4))
    model = nn.Sequential(*((layer, norm) if where == "after" else (norm, layer))).to(dtype)
    folded = assert_folds(model, torch.randn(shape_of(spatial, 4, 5)).to(dtype))
    assert {p.dtype for p in folded.parameters()} == {dtype}


def test_asymmetric_settings():
    conv = nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    assert_folds(nn.Sequential(trained(nn.BatchNorm2d(4)), conv), torch.randn(2, 4, 7, 9))
    convt = nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 2), padding=(1, 0), output_padding=(2, 1), groups=2)
    assert_folds(nn.Sequential(convt, trained(nn.BatchNorm2d(6))), torch.randn(2, 4, 7, 9))


def test_border_is_padded_with_what_the_normalization_makes_zero():
    """The naive fold, which keeps the zero padding, errs at the border; one by one, by hand."""
    norm, conv = trained(nn.BatchNorm2d(3)).double(), nn.Conv2d(3, 2, 3, padding=1).double()
    x = torch.randn(2, 3, 5, 5).double()
    folded = assert_folds(nn.Sequential(norm, conv), x)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    torch.testing.assert_close(folded[1][0].value, -shift / scale)
    naive = F.conv2d(x, folded[1][1].weight, folded[1][1].bias, padding=1)
    exact = nn.Sequential(norm, conv).eval()(x)
    assert (naive - exact).abs().max() > 0.1
    torch.testing.assert_close(naive[..., 1:-1, 1:-1], exact[..., 1:-1, 1:-1])
    assert folded.state_dict().keys() == {"1.0.value", "1.1.weight", "1.1.bias"}


@pytest.mark.parametrize("var", [0.0, 1e-12])
@pytest.mark.parametrize("where", ["before", "after"])
def test_vanishing_variance(var, where):
    norm = trained(nn.BatchNorm2d(4))
    norm.running_var[1:3] = var
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(*((conv, norm) if where == "after" else (norm, conv))).double()
    assert_folds(model, torch.randn(2, 4, 5, 5).double())


def test_zero_gamma():
    norm = trained(nn.BatchNorm2d(4))
    norm.weight.data[1] = 0
    assert_folds(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm), torch.randn(2, 4, 5, 5))
    assert_folds(nn.Sequential(norm, nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 5, 5))
    assert_folds(nn.Sequential(norm, nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), torch.randn(2, 4, 5, 5))
    assert_refused(
        nn.Sequential(norm, nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, 4, 5, 5), "scale is 0 in 1 channels"
    )
    norm.bias.data[1] = 0  # 0·x + 0: zero padding is right as it is
    assert_folds(nn.Sequential(norm, nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, 4, 5, 5))


def test_transposed_convolution_after_a_normalization_without_shift():
    norm = trained(nn.BatchNorm2d(4))
    norm.running_mean.zero_()
    norm.bias.data.zero_()
    model = nn.Sequential(norm, nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2))
    assert_folds(model, torch.randn(2, 4, 5, 5), where="into the layer after")


# --- whole networks ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))))


class ResNet(nn.Module):
    """Declared in another order than it is called in, with functions in between."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.head_norm = nn.BatchNorm1d(8)
        self.stem_norm = norm(8)
        self.head = nn.Linear(8, 5)
        self.stages = nn.Sequential(Residual(8, norm), Residual(8, norm))
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)

    def forward(self, x, scale=None):
        x = self.stages(F.relu(self.stem_norm(self.stem(x))))
        x = self.head(self.head_norm(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return {"logits": x if scale is None else x * scale, "parts": [x, (x.argmax(1),)]}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchlab.nn.BatchNorm2d, nn.SyncBatchNorm])
def test_residual_network(norm):
    model = train_all(ResNet(norm))
    model.stages[0].eval()
    modes = [m.training for m in model.modules()]
    before = values(model)
    folded, report = fold(model, torch.randn(2, 3, 16, 16))
    assert not report.refused, str(report)
    assert {e.norm: e.layer for e in report.folded} == {
        "stem_norm": "stem",
        "head_norm": "head",
        **{f"stages.{i}.norm{j}": f"stages.{i}.conv{j}" for i in (0, 1) for j in (1, 2)},
    }
    assert type(folded) is ResNet
    assert not any(m.training for m in folded.modules())
    assert [m.training for m in model.modules()] == modes
    assert_untouched(before, model)
    x = torch.randn(4, 3, 20, 20)
    reference = copy.deepcopy(model).eval()
    torch.testing.assert_close(folded(x)["logits"], reference(x)["logits"], rtol=1e-4, atol=1e-5)
    assert folded.state_dict().keys() >= {k for k in before if k.endswith("weight") and "norm" not in k}
    assert 0 < report.max_difference <= report.tolerance


@pytest.mark.parametrize("example", ["tuple", "dict"])
def test_example_with_several_arguments(example):
    model, x, scale = train_all(ResNet()), torch.randn(2, 3, 16, 16), torch.tensor(3.0)
    folded, report = fold(model, (x, scale) if example == "tuple" else {"x": x, "scale": scale})
    assert len(report.folded) == 6
    torch.testing.assert_close(folded(x, scale)["logits"], 3 * folded(x)["logits"])


def test_chains_fold_as_far_as_they_can():
    conv_norm_norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.BatchNorm2d(4))
    assert_folds(train_all(conv_norm_norm), torch.randn(2, 3, 6, 6), where="into the layer before")
    norm_norm_conv = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    folded = assert_folds(train_all(norm_norm_conv), torch.randn(2, 3, 6, 6), where="into the layer after")
    assert isinstance(folded[3][0], ChannelPad)
    both = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2, padding="same"), nn.BatchNorm2d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_folds(train_all(both), torch.randn(2, 3, 6, 6))


def test_between_two_layers_the_one_before_is_preferred():
    model = train_all(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    folded = assert_folds(model, torch.randn(5, 3), where="into the layer before")
    assert torch.equal(folded[2].weight, model[2].weight)


@pytest.mark.parametrize(
    ("activation", "module"),
    [("relu", nn.ReLU), ("leaky_relu", nn.LeakyReLU), ("silu", nn.SiLU), ("sigmoid", nn.Sigmoid)],
)
def test_activation_of_our_layers_becomes_a_module(activation, module):
    model = nn.Sequential(nn.Linear(3, 4), trained(batchlab.nn.BatchNorm1d(4, activation=activation)))
    folded = assert_folds(model, torch.randn(5, 3))
    assert type(folded[1]) is module
    chain = nn.Sequential(*model, trained(batchlab.nn.BatchNorm1d(4)))  # the second must not reach the linear layer
    _, report = fold(chain, torch.randn(5, 3))
    assert actions(report) == {"1": "folded", "2": "refused"}
    assert "comes from BatchNorm1d '1'" in report.refused[0].reason
    before = nn.Sequential(trained(batchlab.nn.BatchNorm1d(3, activation=activation)), nn.Linear(3, 2))
    assert_refused(before, torch.randn(5, 3), f"its activation '{activation}'")


def test_inserted_trained_recalibrated_folded():
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))
    batchlab.surgery.insert_batch_norm(model)
    batchlab.surgery.recalibrate(model, [torch.randn(50, 6) + 2 for _ in range(4)])
    folded = assert_folds(model, torch.randn(7, 6), where="into the layer before")
    assert [type(m).__name__ for m in folded] == [*["Linear", "Identity", "Sigmoid"] * 2, "Linear"]


def test_result_can_be_saved_copied_compiled_and_folded_again():
    model = train_all(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 6, 6)
    folded = fold(model, x).model
    y = folded(x)
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    twin = copy.deepcopy(folded)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(folded.state_dict())
    assert torch.equal(twin(x), y)
    torch.testing.assert_close(torch.compile(folded, backend="aot_eager", fullgraph=True)(x), y)
    again, report = fold(folded, x)
    assert report.entries == ()
    assert torch.equal(again(x), y)
    assert "no batch normalization" in str(report)


def test_folded_model_shares_no_tensor_with_the_original():
    model = train_all(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))
    before = values(model)
    folded = fold(model, torch.randn(5, 3)).model
    for parameter in folded.parameters():
        parameter.data.fill_(7)
    assert_untouched(before, model)


def test_original_is_untouched_in_every_respect():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.calls = nn.Linear(3, 4), nn.BatchNorm1d(4), 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            x.mul_(2)  # writes into the example
            return self.norm(self.fc(x)) + 0 * torch.rand(())

    model, x = Counting(), torch.randn(5, 3)
    model.norm.eval()
    given, state, before = x.clone(), torch.get_rng_state(), values(model)
    folded = fold(model, x).model
    assert_untouched(before, model)
    assert (model.calls, folded.calls, folded.seen.item()) == (0, 0, 0)
    assert (model.training, model.fc.training, model.norm.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)


# --- refusals ------------------------------------------------------------------------------------------------------


def assert_refused(model, x, reason, *, name=None):
    """The named (or every) normalization is refused for the reason, and the copy computes what the model does."""
    before = values(model)
    folded, report = fold(model, x)
    entries = [entry for entry in report.refused if name in (None, entry.norm)]
    assert entries, str(report)
    assert name is not None or not report.folded, str(report)
    assert all(reason in entry.reason for entry in entries), str(report)
    assert_untouched(before, model)
    if not report.folded:
        assert folded.state_dict().keys() == before.keys()
        assert all(torch.equal(v, before[k]) for k, v in folded.state_dict().items())
    assert compare(copy_model(model).eval()(x), folded(x), 1e-5).holds
    return report


class Net(nn.Module):
    """Layers by name, and a forward given as a function of (self, x)."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)
        train_all(self)

    def forward(self, x):
        return self._forward(self, x)


def fc(width=3):
    return nn.Linear(width, width)


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))


def test_reused_modules():
    net = Net(
        lambda s, x: s.norm1(s.fc(x)) + s.norm2(s.fc(x)), fc=fc(), norm1=nn.BatchNorm1d(3), norm2=nn.BatchNorm1d(3)
    )
    assert_refused(net, X, "'fc' is called 2 times")
    net = Net(lambda s, x: s.norm(s.a(x)) + s.norm(s.b(x)), a=fc(), b=fc(), norm=nn.BatchNorm1d(3))
    assert_refused(net, X, "called 2 times")
    twice = Net(lambda s, x: s.block(s.block(x)), block=nn.Sequential(fc(), nn.BatchNorm1d(3)))
    assert_refused(twice, X, "called 2 times")


def test_shared_modules_and_tied_weights():
    layer = fc()
    tied = fc()
    tied.weight = layer.weight
    net = Net(lambda s, x: s.norm(s.a(x)) + s.b(x), a=layer, b=tied, norm=nn.BatchNorm1d(3))
    assert_refused(net, X, "shares a parameter")
    two_names = Net(lambda s, x: s.norm(s.a(x)), a=fc(), norm=nn.BatchNorm1d(3))
    two_names.alias = two_names.a
    assert_refused(two_names, X, "under 2 names")
    two_norms = Net(lambda s, x: s.norm(s.a(x)), a=fc(), norm=nn.BatchNorm1d(3))
    two_norms.alias = two_norms.norm
    assert_refused(two_norms, X, "under 2 names", name="norm")
    affine = Net(
        lambda s, x: s.norm1(s.a(x)) + s.norm2(s.b(x)),
        **{"a": fc(), "b": fc(), "norm1": nn.BatchNorm1d(3), "norm2": nn.BatchNorm1d(3)},
    )
    affine.norm2.weight = affine.norm1.weight
    assert_refused(affine, X, "shares a parameter")


def test_outputs_that_something_else_uses():
    assert_refused(Net(lambda s, x: s.norm(y := s.fc(x)) + y, fc=fc(), norm=nn.BatchNorm1d(3)), X, "used 2 times")
    assert_refused(Net(lambda s, x: s.fc(y := s.norm(x)) + y, fc=fc(), norm=nn.BatchNorm1d(3)), X, "used 2 times")

    def returned(s, x):
        y = s.fc(x)
        return s.norm(y), y

    assert_refused(Net(returned, fc=fc(), norm=nn.BatchNorm1d(3)), X, "used 2 times")


def test_writes_in_place_are_seen():
    def into_output(s, x):
        y = s.fc(x)
        z = y
        z += 1
        return s.norm(y)

    assert_refused(Net(into_output, fc=fc(), norm=nn.BatchNorm1d(3)), X, "")

    def into_input(s, x):
        u = x * 1
        y = s.norm(u)
        u += 1
        return s.fc(y)

    assert_refused(Net(into_input, fc=fc(), norm=nn.BatchNorm1d(3)), X, "may write into its input")

    def by_module(s, x):
        u = x * 1
        y = s.norm(u)
        s.relu(u)
        return s.fc(y)

    assert_refused(
        Net(by_module, fc=fc(), norm=nn.BatchNorm1d(3), relu=nn.ReLU(inplace=True)), X, "may write into its input"
    )


def test_order_of_declaration_is_not_data_flow():
    net = Net(lambda s, x: s.fc(torch.relu(s.norm(x * 2))), fc=fc(), norm=nn.BatchNorm1d(3))
    assert_refused(net, X, "its output goes to relu()")


def test_neighbours_that_are_no_layers():
    report = assert_refused(nn.Sequential(nn.ReLU(), trained(nn.BatchNorm1d(3)), nn.ReLU()), X, "before: ")
    assert "comes from ReLU '0'" in report.refused[0].reason
    assert "goes to ReLU '2'" in report.refused[0].reason
    assert_refused(trained(nn.BatchNorm1d(3)), X, "is called 1 times, of which the trace shows 0")


def test_dimensions_that_a_linear_layer_does_not_share():
    sequences = nn.Sequential(nn.Linear(4, 3), trained(nn.BatchNorm1d(3)))
    assert_refused(sequences, torch.randn(2, 3, 4), "input of 3 dimensions")
    square = nn.Sequential(trained(nn.BatchNorm1d(3)), nn.Linear(3, 3))
    assert_refused(square, torch.randn(2, 3, 3), "input of 3 dimensions")
    unbatched = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), trained(nn.BatchNorm1d(7)))
    assert_refused(unbatched, torch.randn(3, 7), "input of 2 dimensions")


def test_calls_with_residual_or_mask():
    norm = batchlab.nn.BatchNorm1d(3)
    assert_refused(Net(lambda s, x: s.norm(s.fc(x), residual=x), fc=fc(), norm=norm), X, "called with residual=")
    assert_refused(Net(lambda s, x: s.norm(s.fc(x), mask=x[:, :1] > 0), fc=fc(), norm=norm), X, "called with mask=")
    assert_refused(Net(lambda s, x: s.norm(s.fc(x), mask=None), fc=fc(), norm=norm), X, "called with mask=")
    assert_folds(Net(lambda s, x: s.norm(input=s.fc(input=x)), fc=fc(), norm=nn.BatchNorm1d(3)), X)


def test_statistics_that_are_none_or_not_used():
    assert_refused(nn.Sequential(fc(), nn.BatchNorm1d(3, track_running_stats=False)), X, "no running statistics")
    batch = trained(batchlab.nn.BatchNorm1d(3))
    batch.statistics = "batch"
    assert_refused(nn.Sequential(fc(), batch), X, "statistics of the batch")
    negative = trained(nn.BatchNorm1d(3))
    negative.running_var[1] = -1e-6
    assert_refused(nn.Sequential(fc(), negative), X, "negative")
    infinite = trained(nn.BatchNorm1d(3))
    infinite.running_mean[0] = torch.inf
    _, report = fold(nn.Sequential(fc(), infinite), X)
    assert "not finite" in report.refused[0].reason
    flat = trained(nn.BatchNorm1d(3, eps=0.0))
    flat.running_var[0] = 0
    _, report = fold(nn.Sequential(fc(), flat), X)
    assert "not finite" in report.refused[0].reason


def test_frozen_normalization_folds():
    frozen = trained(batchlab.nn.BatchNorm1d(3))
    frozen.statistics, frozen.update_statistics = "running", False
    assert_folds(nn.Sequential(fc(), frozen), X)


def test_weights_that_overflow():
    norm = trained(nn.BatchNorm1d(3)).half()
    norm.running_var.fill_(0)
    norm.eps = 1e-12
    assert_refused(nn.Sequential(nn.Linear(3, 3).half(), norm), X.half(), "do not fit into torch.float16")


def test_transposed_convolution_after_a_shift():
    model = nn.Sequential(trained(nn.BatchNorm2d(4)), nn.ConvTranspose2d(4, 6, 3))
    assert_refused(model, torch.randn(2, 4, 5, 5), "transposed convolution")


def test_unknown_subclasses():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    class Clamped(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    assert_refused(nn.Sequential(Doubled(3, 3), trained(nn.BatchNorm1d(3))), X, "Doubled, which extends Linear")
    assert_refused(nn.Sequential(fc(), trained(Clamped(3))), X, "Clamped, which extends")


def test_parametrized_and_hooked_layers():
    parametrized = nn.utils.parametrizations.weight_norm(fc())
    assert_refused(nn.Sequential(parametrized, trained(nn.BatchNorm1d(3))), X, "is parametrized")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(fc())
    assert_refused(nn.Sequential(old, trained(nn.BatchNorm1d(3))), X, "has forward hooks")
    pruned = prune.random_unstructured(fc(), "weight", 0.5)
    assert_refused(nn.Sequential(pruned, trained(nn.BatchNorm1d(3))), X, "has forward hooks")
    hooked = nn.Sequential(fc(), trained(nn.BatchNorm1d(3)))
    hooked[1].register_forward_hook(lambda m, args, y: y * 2)
    assert_refused(hooked, X, "has forward hooks")
    patched = nn.Sequential(fc(), trained(nn.BatchNorm1d(3)))
    patched[0].forward = lambda x: x * 2
    assert_refused(patched, X, "forward of its own")


def test_hook_of_a_container_between_the_two():
    model = nn.Sequential(nn.Sequential(nn.ReLU(), fc()), nn.Sequential(trained(nn.BatchNorm1d(3)), nn.ReLU()))
    assert_folds(model, X)
    seen = []
    model[0].register_forward_hook(lambda m, args, y: seen.append(y))
    assert_refused(model, X, "'0' lies between the two and has forward hooks")
    assert all(isinstance(y, torch.Tensor) for y in seen)  # never a symbol of the trace
    whole = nn.Sequential(nn.Sequential(fc(), trained(nn.BatchNorm1d(3))))
    whole[0].register_forward_hook(lambda m, args, y: y * 2)  # after both: does not matter
    assert_folds(whole, X)


def test_parameters_that_the_forward_reads_itself():
    assert_refused(
        Net(lambda s, x: s.norm(s.fc(x)) + s.fc.bias, fc=fc(), norm=nn.BatchNorm1d(3)), X, "also reads directly"
    )
    net = Net(lambda s, x: s.norm(s.fc(x)) + s.norm.running_mean, fc=fc(), norm=nn.BatchNorm1d(3))
    assert_refused(net, X, "also reads directly")


def test_hidden_calls_are_counted():
    class Hidden(nn.Module):
        """Calls a layer that it does not own, where the trace, for want of children and traceability, does not look."""

        def __init__(self, layer):
            super().__init__()
            self.layers = (layer,)

        def forward(self, x):
            return self.layers[0](x) if x.sum() > 1e9 or True else x

    layer = fc()
    net = Net(lambda s, x: s.norm(s.layer(x)) + s.hidden(x), layer=layer, norm=nn.BatchNorm1d(3), hidden=Hidden(layer))
    assert_refused(net, X, "is called 2 times")


def test_what_verification_finds_is_refused_one_by_one():
    """A forward that depends on its layers in ways no trace shows: only the fold that breaks it is refused."""

    def forward(s, x):
        y = s.norm1(s.fc1(x)) * len(s.norm1._parameters)
        return s.norm2(s.fc2(torch.relu(y)))

    net = Net(forward, fc1=fc(), fc2=fc(), norm1=nn.BatchNorm1d(3), norm2=nn.BatchNorm1d(3))
    report = assert_refused(net, X, "the output differs by", name="norm1")
    assert actions(report) == {"norm1": "refused", "norm2": "folded"}
    net = Net(
        lambda s, x: s.norm2(s.fc2(s.norm1(s.fc1(x)) * s.norm1.num_features)),
        **{"fc1": fc(), "fc2": fc(), "norm1": nn.BatchNorm1d(3), "norm2": nn.BatchNorm1d(3)},
    )
    report = assert_refused(net, X, "does not run without it: AttributeError", name="norm1")
    assert actions(report) == {"norm1": "refused", "norm2": "folded"}
    assert report.max_difference <= report.tolerance


# --- errors and the report -----------------------------------------------------------------------------------------


def test_errors_name_the_way_out():
    model = nn.Sequential(fc(), nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match=r"pass model\.module"):
        fold(nn.DataParallel(model), X)
    with pytest.raises(TypeError, match=r"pass model\._orig_mod"):
        fold(torch.compile(model, backend="eager"), X)
    with pytest.raises(ValueError, match="not initialized"):
        fold(nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)), X)
    with pytest.raises(ValueError, match="meta"):
        fold(nn.Sequential(nn.Linear(3, 3, device="meta"), nn.BatchNorm1d(3)), X)
    with pytest.raises(ValueError, match="does not run on example_input"):
        fold(model, torch.randn(2, 7))
    with pytest.raises(ValueError, match="nothing to verify"):
        fold(Net(lambda s, x: str(s.norm(x)), norm=nn.BatchNorm1d(3)), X)
    depends = Net(lambda s, x: s.norm(x) if x.sum() > 0 else x, norm=nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"cannot be traced.*submodules that are traceable"):
        fold(depends, X)
    without = Net(lambda s, x: s.fc(x) if x.sum() > 0 else x, fc=fc())
    assert fold(without, X).report == FoldReport((), 0.0, 0.0)  # nothing to trace for


def test_report_reads_as_a_table():
    model = train_all(nn.Sequential(fc(), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)))
    report = fold(model, X).report
    lines = str(report).splitlines()
    assert lines[0].split() == ["batch", "normalization", "action", "layer", "where", "reason"]
    assert lines[1].split()[:3] == ["1", "folded", "0"]
    assert lines[2].split()[:3] == ["3", "refused", "-"]
    assert "1 folded, 1 refused" in lines[3]
    assert [e.norm for e in report.folded] == ["1"]
    assert [e.norm for e in report.refused] == ["3"]


def test_compare_tells_outputs_apart():
    x = torch.tensor([1.0, 100.0])
    assert compare(x, x + 0.009, 1e-4).holds
    assert not compare(x, x + 0.011, 1e-4).holds
    assert compare(torch.tensor([torch.nan, torch.inf]), torch.tensor([torch.nan, torch.inf]), 0.0).holds
    assert not compare(torch.tensor([torch.nan]), torch.tensor([0.0]), 1.0).holds
    assert not compare(torch.tensor([0.0]), torch.tensor([torch.nan]), 1.0).holds
    assert not compare(torch.tensor([1]), torch.tensor([2]), 1.0).holds
    assert not compare((x, x), (x,), 1.0).holds
    assert not compare(x, x[:1], 1.0).holds
    assert not compare({"a": [x, (x + 1,)]}, {"a": [x, (x,)]}, 1e-4).holds


@pytest.mark.parametrize(
    ("padding", "value"), [([1], torch.zeros(2)), ([-1, 0], torch.zeros(2)), ([1, 1], torch.zeros(()))]
)
def test_channel_pad_checks_its_arguments(padding, value):
    with pytest.raises(ValueError, match=r"padding is|value has shape"):
        ChannelPad(padding, value)


def test_channel_pad_by_hand():
    pad = ChannelPad([1, 2, 0, 1], torch.tensor([5.0, -5.0]))
    x = torch.arange(8.0).view(1, 2, 2, 2).requires_grad_()
    y = pad(x)
    expected = torch.stack([F.pad(x[0, c], (1, 2, 0, 1), value=v) for c, v in enumerate((5.0, -5.0))])[None]
    assert torch.equal(y, expected)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with pytest.raises(ValueError, match="needs"):
        pad(x[0])
    with pytest.raises(ValueError, match="needs"):
        pad(torch.zeros(1, 3, 2, 2))
