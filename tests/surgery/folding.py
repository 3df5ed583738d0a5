"""What the tests of `fold` share: trained normalizations, and what a fold must leave and must reach."""

from __future__ import annotations

import copy

import torch
from torch import nn

import batchlab
from batchlab.surgery import fold
from batchlab.surgery.copies import copy_model
from batchlab.surgery.verify import compare

NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OUR_NORM = {
    0: batchlab.nn.BatchNorm1d,
    1: batchlab.nn.BatchNorm1d,
    2: batchlab.nn.BatchNorm2d,
    3: batchlab.nn.BatchNorm3d,
}
RTOL = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


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
