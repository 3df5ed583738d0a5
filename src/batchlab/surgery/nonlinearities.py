"""The nonlinearities that Algorithm 2 puts a normalization before: as modules, functions and methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["NONLINEAR_FUNCTIONS", "NONLINEAR_METHODS", "NONLINEAR_MODULES"]

NONLINEAR_MODULES: Final[tuple[type[nn.Module], ...]] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Tanhshrink, nn.Hardswish),
    *(nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Threshold),
)

NONLINEAR_FUNCTIONS: Final[frozenset[Callable[..., Any]]] = frozenset(
    [
        *(F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu),
        *(F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_, F.elu, F.elu_, F.selu, F.selu_, torch.selu, torch.selu_),
        *(F.celu, F.celu_, torch.celu, torch.celu_, F.gelu, F.silu, F.mish),
        *(F.sigmoid, torch.sigmoid, torch.sigmoid_, torch.special.expit, F.logsigmoid, F.hardsigmoid),
        *(F.tanh, torch.tanh, torch.tanh_, F.hardtanh, F.hardtanh_, F.tanhshrink, F.hardswish),
        *(F.softplus, F.softsign, F.softshrink, F.hardshrink, torch.hardshrink),
        *(F.threshold, torch.threshold, torch.threshold_),
    ]
)

NONLINEAR_METHODS: Final = frozenset(["relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "prelu", "hardshrink"])
