"""Networks with dropout for the tests of `to_batchwise_dropout`, and whether one is as it was."""

from __future__ import annotations

import torch
from torch import nn


def names(model):
    return [type(child).__name__ for child in model]


def snapshot(model):
    """Everything a failed conversion must leave: structure, types, objects, values, gradients, modes, attributes."""
    return (
        [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, id(b)) for name, b in model.named_buffers()],
        [sorted(vars(m)) for m in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
    )


def assert_same(before, model):
    after = snapshot(model)
    assert before[:4] == after[:4]
    for old, new in zip(before[4:], after[4:], strict=True):
        assert old.keys() == new.keys()
        assert all(value is new[name] is None or torch.equal(value, new[name]) for name, value in old.items())


class Net(nn.Module):
    """Layers by name, and a forward given as a function of (self, x)."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self._forward(self, x)


def perceptron(p=0.5, **options):
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(p, **options), nn.Linear(12, 3))


def vgg():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.25)),
        *(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout2d(0.5)),
        *(nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)),
    )


IMAGES = torch.randn(5, 3, 8, 8)


ROWS = torch.randn(5, 6)


# --- what is converted ---------------------------------------------------------------------------------------------
