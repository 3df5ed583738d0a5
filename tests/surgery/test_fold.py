"""`fold`: the folded copy against the model itself, on inputs that the fold never saw."""

from __future__ import annotations

import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchlab
from batchlab.surgery import ChannelPad, fold
from tests.surgery.folding import (
    NORM,
    OUR_NORM,
    actions,
    assert_folds,
    assert_refused,
    assert_untouched,
    train_all,
    trained,
    values,
)

LAYERS = {
    "linear": (nn.Linear, 0),
    "conv1d": (nn.Conv1d, 1),
    "conv2d": (nn.Conv2d, 2),
    "conv3d": (nn.Conv3d, 3),
    "conv_transpose1d": (nn.ConvTranspose1d, 1),
    "conv_transpose2d": (nn.ConvTranspose2d, 2),
    "conv_transpose3d": (nn.ConvTranspose3d, 3),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def test_our_dropouts_do_not_stand_in_the_way():
    kinds = (batchlab.nn.BatchwiseDropout, batchlab.nn.Dropout, batchlab.nn.GaussianDropout, batchlab.nn.UniformDropout)
    for kind in kinds:
        model = nn.Sequential(nn.Linear(3, 4), kind(), nn.BatchNorm1d(4))
        assert_folds(train_all(model), torch.randn(5, 3), where="into the layer before")


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
