"""`fold`: what it must refuse, with which reason, and what its report says."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import batchlab
from batchlab.surgery import ChannelPad, FoldReport, fold
from batchlab.surgery.verify import compare
from tests.surgery.folding import (
    actions,
    assert_folds,
    assert_refused,
    train_all,
    trained,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
