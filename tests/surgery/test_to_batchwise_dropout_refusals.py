"""`to_batchwise_dropout`: what it refuses, masks or leaves, with reasons, and that nothing changes when it fails."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.nn import BatchwiseDropout, SubmatrixSequential
from batchlab.surgery import to_batchwise_dropout
from tests.surgery.dropout_networks import IMAGES, ROWS, Net, assert_same, names, perceptron, snapshot, vgg


def permutes(self, x):
    return self.out(self.drop(self.fc(x).transpose(1, 2)).mean(-1))


def attends(self, x):
    scores = torch.softmax(self.fc(x) @ self.fc(x).transpose(1, 2), -1)
    return self.out(self.drop(scores) @ self.fc(x))


def disagrees(self, x):
    return self.out(self.drop(self.fc(x) + self.conv(x)))


@pytest.mark.parametrize("forward", [permutes, attends, disagrees])
def test_unclear_features_are_refused(forward):
    layers = {"fc": nn.Linear(6, 6), "conv": nn.Conv1d(6, 6, 1), "out": nn.Linear(6, 2), "drop": nn.Dropout()}
    model = Net(forward, **layers)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Dropout 'drop' cannot be converted.*which has the features.*dim=\.\.\."):
        to_batchwise_dropout(model, torch.randn(4, 6, 6))
    assert_same(before, model)
    model.drop = BatchwiseDropout(dim=-1)  # the way out that the message names
    to_batchwise_dropout(model, torch.randn(4, 6, 6))


# --- what is reported ----------------------------------------------------------------------------------------------


def test_attributes_mask_and_are_reported_in_one_warning():
    def forward(self, x):
        return self.fc2(self.drop(torch.relu(self.fc1(self.input(x)))))

    model = Net(forward, input=nn.Dropout(0.2), fc1=nn.Linear(6, 8), drop=nn.Dropout(0.5), fc2=nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="these dropouts are batchwise now, but only mask") as caught:
        to_batchwise_dropout(model, ROWS)
    message = str(caught[0].message)
    assert len(caught) == 1
    assert "Dropout 'input': it is called by Net" in message
    assert "Dropout 'drop': it is called by Net" in message
    assert "nn.Sequential" in message
    model(ROWS)
    assert len(model.drop.kept) == 4


def sliced(self, x):
    return self.body[2:](self.body[:2](x))


def iterated(self, x):
    for layer in self.body:
        x = layer(x)
    return x


@pytest.mark.parametrize("forward", [sliced, iterated])
def test_sequential_that_is_not_called_as_a_whole(forward):
    model = Net(forward, body=perceptron())
    with pytest.warns(UserWarning, match="'body' around it is not called as a whole"):
        to_batchwise_dropout(model, ROWS)
    assert type(model.body) is nn.Sequential
    assert type(model.body[2]) is BatchwiseDropout


def test_sequential_without_a_product_next_to_the_dropout():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Dropout2d(), nn.Flatten(), nn.Softmax(1), nn.Linear(16, 2))
    with pytest.warns(UserWarning, match="no Linear or Conv"):
        to_batchwise_dropout(model, torch.randn(3, 4, 4, 4))
    assert type(model) is nn.Sequential
    assert type(model[1]) is BatchwiseDropout


def test_sequential_of_more_than_tensors():
    class Twice(nn.Module):
        def forward(self, x):
            return x, x

    class Sum(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    model = nn.Sequential(Twice(), Sum(), nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="takes one tensor"):
        to_batchwise_dropout(model, ROWS)
    assert type(model) is nn.Sequential


def test_patched_layer_in_a_sequential():
    model = perceptron()
    layer = model[0]
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 2
    with pytest.warns(UserWarning, match="forward that was replaced"):
        to_batchwise_dropout(model, ROWS)
    assert type(model) is nn.Sequential


class Scaled(nn.Dropout):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (nn.AlphaDropout(), "does not become zero"),
        (nn.FeatureAlphaDropout(), "does not become zero"),
        (Scaled(), "not known"),
    ],
)
def test_other_dropouts_are_left_and_named(other, reason):
    model = nn.Sequential(*perceptron(), nn.SELU(), copy.deepcopy(other), nn.Linear(3, 2))
    with pytest.warns(
        UserWarning, match=rf"these dropouts are left as they were:\n  {type(other).__name__} '5': .*{reason}"
    ):
        to_batchwise_dropout(model, ROWS)
    assert type(model[5]) is type(other)
    assert type(model[2]) is BatchwiseDropout
    assert type(model) is SubmatrixSequential
    with pytest.raises(ValueError, match=rf"cannot be converted:\n  {type(other).__name__}"):
        to_batchwise_dropout(nn.Sequential(nn.Linear(6, 6), copy.deepcopy(other)), ROWS)


def test_patched_dropout_is_left():
    model = nn.Sequential(*perceptron(), nn.Dropout(), nn.Linear(3, 2))
    model[4].forward = lambda x: x * 2
    with pytest.warns(UserWarning, match="Dropout '4': its forward was replaced"):
        to_batchwise_dropout(model, ROWS)
    assert type(model[4]) is nn.Dropout


def test_functions_are_named():
    def forward(self, x):
        x = F.dropout(self.body(x), 0.5, self.training)
        x = F.dropout(x, 0.0)
        return F.dropout(x, 0.5, False)

    model = Net(forward, body=perceptron())
    with pytest.warns(UserWarning, match=r"these dropouts are left as they were:\n  dropout\(\): a function"):
        to_batchwise_dropout(model, ROWS)
    assert type(model.body) is SubmatrixSequential


def test_torchs_compound_layers_are_left_and_named():
    def forward(self, x):
        x = self.layer(x)
        return self.head(x + self.quiet(x, x, x)[0] + self.attention(x, x, x)[0] + self.lstm(x)[0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Net(
            forward,
            layer=nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True),
            quiet=nn.MultiheadAttention(6, 2, batch_first=True),
            attention=nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True),
            lstm=nn.LSTM(6, 6, num_layers=2, dropout=0.3, batch_first=True),
            head=perceptron(),
        )
    with pytest.warns(UserWarning, match="left as they were") as caught:
        to_batchwise_dropout(model, torch.randn(4, 5, 6))
    message = str(caught[0].message)
    assert all(f"'{name}': it drops inside" in message for name in ("layer", "attention", "lstm"))
    assert "quiet" not in message
    assert type(model.layer.dropout) is nn.Dropout
    assert (type(model.head), model.head[2].dim) == (SubmatrixSequential, -1)


def test_dropout_that_the_example_does_not_reach():
    model = Net(lambda self, x: self.body(x), body=perceptron(), other=nn.Dropout())
    with pytest.warns(UserWarning, match="Dropout 'other': the example does not reach it"):
        to_batchwise_dropout(model, ROWS)
    assert type(model.other) is nn.Dropout


# --- refusals ------------------------------------------------------------------------------------------------------


def test_nothing_to_convert():
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Dropout"):
        to_batchwise_dropout(nn.Sequential(nn.Linear(6, 2), nn.ReLU()), ROWS)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.Dropout()), (6,), "1 dimensions; give an example with a batch"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d()), (3, 8, 8), "3 dimensions, and a batch for it has 4"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()), (3, 8, 8), "3 dimensions and no batch"),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Dropout()), (3, 8), "2 dimensions and no batch"),
        (nn.Sequential(nn.Linear(6, 4), nn.Dropout1d()), (5, 6), "2 dimensions, and a batch for it has 3"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_examples_without_a_batch_are_refused(model, shape, reason):
    before = snapshot(model)
    with pytest.raises(ValueError, match=reason):
        to_batchwise_dropout(model, torch.randn(shape))
    assert_same(before, model)


def test_inputs_of_different_dimensions_are_refused():
    def forward(self, x):
        return self.fc(self.drop(self.drop(self.conv(x)).flatten(1)))

    model = Net(forward, conv=nn.Conv2d(3, 2, 3), drop=nn.Dropout(), fc=nn.Linear(72, 2))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'drop' .*inputs of 2 and 4 dimensions; use a dropout of its own"):
        to_batchwise_dropout(model, IMAGES)
    assert_same(before, model)


def test_wrong_mode():
    model = perceptron()
    before = snapshot(model)
    with pytest.raises(ValueError, match="mode is 'fast'"):
        to_batchwise_dropout(model, ROWS, mode="fast")
    assert_same(before, model)


def test_example_that_does_not_fit():
    model = vgg()
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not run on example_input in training mode"):
        to_batchwise_dropout(model, ROWS)
    assert_same(before, model)


def test_wrappers_are_refused_with_the_way_out():
    model = perceptron()
    with pytest.raises(TypeError, match=r"pass model\.module"):
        to_batchwise_dropout(nn.DataParallel(model), ROWS)
    with pytest.raises(TypeError, match=r"pass model\._orig_mod"):
        to_batchwise_dropout(torch.compile(model, backend="eager"), ROWS)
    with pytest.raises(TypeError, match="needs a torch"):
        to_batchwise_dropout(torch.relu, ROWS)
    with pytest.raises(ValueError, match="not initialized"):
        to_batchwise_dropout(nn.Sequential(nn.LazyLinear(3), nn.Dropout()), ROWS)
    with pytest.raises(ValueError, match="meta device"):
        to_batchwise_dropout(perceptron().to("meta"), ROWS)
    assert names(model) == ["Linear", "ReLU", "Dropout", "Linear"]


def test_model_that_cannot_be_copied_is_as_before():
    model = perceptron()
    model.lock = __import__("threading").Lock()
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be copied"):
        to_batchwise_dropout(model, ROWS)
    assert_same(before, model)


@pytest.mark.parametrize("wrong", ["run_submatrix", "run_masked"])
def test_wrong_arithmetic_is_found(monkeypatch, wrong):
    import batchlab.nn.submatrix_sequential as container

    real = getattr(container, wrong)
    monkeypatch.setattr(container, wrong, lambda steps, x: real(steps, x) * (1 + 1e-9))
    model = vgg()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"differs in outputs with mode=.* the model is as it was"):
        to_batchwise_dropout(model, IMAGES)
    assert_same(before, model)


def test_wrong_gradients_are_found(monkeypatch):
    import batchlab.nn.submatrix_sequential as container

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (1 + 1e-9)

    real = container.run_submatrix
    monkeypatch.setattr(container, "run_submatrix", lambda steps, x: Wrong.apply(real(steps, x)))
    model = vgg()
    before = snapshot(model)
    with pytest.raises(ValueError, match="differs in gradients"):
        to_batchwise_dropout(model, IMAGES)
    assert_same(before, model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_half_way_rolls_back(monkeypatch, error):
    import batchlab.surgery.dropout_apply as applying

    model = vgg()
    model[0].note = "mine"
    before = snapshot(model)
    real, changed = applying._become, []

    def failing(module, *args, **options):
        real(module, *args, **options)
        if module in set(model.modules()):  # the copies go well
            changed.append(type(module))
            if len(changed) == 4:
                raise error

    monkeypatch.setattr(applying, "_become", failing)
    with pytest.raises(error):
        to_batchwise_dropout(model, IMAGES)
    assert changed == [BatchwiseDropout] * 3 + [SubmatrixSequential]
    assert_same(before, model)


# --- all kinds of models -------------------------------------------------------------------------------------------


def test_model_that_cannot_train_is_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4, 2))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"does not make a training step.*inplace operation"):
        to_batchwise_dropout(model, ROWS)
    assert_same(before, model)


def test_parametrized_layers_are_masked():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(6, 6))
    new = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    model = nn.Sequential(old, nn.Dropout(), new, nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
    model(ROWS).sum().backward()
    with pytest.warns(UserWarning, match="Dropout '1'.*no Linear"):
        to_batchwise_dropout(model, ROWS)
    assert "columns of 5" in repr(model)
