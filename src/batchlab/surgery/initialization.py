"""New weights for a model, of the variance that fits what stands between its layers (He et al. 2015, section 2.2)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from batchlab.nn import init
from batchlab.nn.init import check_mode
from batchlab.surgery.initialization_plan import plan_initialization
from batchlab.surgery.initialization_report import InitializationReport, InitializationResult
from batchlab.surgery.wrappers import check_model

__all__ = ["initialize"]

SCHEMES: Final = ("he", "xavier")
DISTRIBUTIONS: Final = {"normal": init.he_normal_, "uniform": init.he_uniform_}


def initialize(
    model: nn.Module,
    scheme: str = "he",
    *,
    mode: str = "forward",
    distribution: str = "normal",
    generator: torch.Generator | None = None,
) -> InitializationResult:
    """Give the linear and convolution layers of a model new weights that keep the variance, in place; biases become 0.

    Var[w] = 2 keep / ((1 + slope²) n),   n = k² c_in / groups forward, k² c_out / groups backward

    The data flow tells slope and keep. "forward", as in the derivation, counts the rectifier in front of a layer, so
    that the layer's output has the variance of the output before; "backward" counts the one behind it. The slope is 0
    for ReLU, and for GELU, SiLU, ELU and the like, which come close; that of LeakyReLU; the root mean square of a
    PReLU's slopes (0.25 when new); 1 where there is no rectifier: behind the model's input, which strictly needs
    n Var[w] = 1, behind a normalization, an addition or another layer, and for sigmoid and tanh (Xavier). keep is 1 - p
    of the dropouts in front. Pooling counts as nothing, as in the paper.

    A model that torch.fx cannot trace is traced by parts, from the outermost ones that can be; a layer that no trace
    reaches is left. So are layers of other kinds, subclasses, parametrized and frozen weights, and weights that such
    layers share. The report has them all, with reasons. Normalizations and slopes stay as they are.

    Args:
        model: changed in place; on any exception it is as before. Parameters stay the same objects.
        scheme: "he", or "xavier" for slope 1 everywhere (n Var[w] = 1, the paper's comparison).
        mode: "forward" keeps the variance of activations, "backward" that of gradients. The paper finds that either
            alone is enough.
        distribution: "normal" or "uniform".
        generator: where weights are drawn from; None: torch's default.

    Returns:
        the model, and a report with slope, keep, n and standard deviation of each layer.

    Raises:
        TypeError: the model is wrapped (DistributedDataParallel, torch.compile, ...) or scripted.
        ValueError: an unknown option, a lazy parameter, or no layer that can be initialized.

    Source: He et al. 2015, equations 7 to 15; keep, groups and strides custom.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(50, 100), nn.PReLU(), nn.Dropout(0.5), nn.Linear(100, 100), nn.ReLU())
    >>> print(initialize(model).report)
    layer  action       slope  keep  terms  std     reason
    0      initialized  1      1     50     0.1414  first behind the model's input
    3      initialized  0.25   0.5   100    0.09701 behind PReLU '1'
    2 initialized, 0 left
    """
    check_model(model, "initialize")
    check_mode(mode)
    for what, given, allowed in (("scheme", scheme, SCHEMES), ("distribution", distribution, tuple(DISTRIBUTIONS))):
        if given not in allowed:
            raise ValueError(f"{what} is {given!r}; allowed are {', '.join(map(repr, allowed))}")
    plan = plan_initialization(model, scheme, mode)
    if not plan.options:
        left = "".join(f"\n  {entry.layer or '(the model)'}: {entry.reason}" for entry in plan.entries)
        raise ValueError(f"{type(model).__name__} has no layer that can be initialized{':' if left else ''}{left}")
    # All drawn before any is written: a generator on another device then fails with the model as it was.
    drawn: list[tuple[Tensor, Tensor]] = []
    for name, options in plan.options.items():
        parameters = model.get_submodule(name)._parameters
        for key, parameter in (("weight", parameters["weight"]), ("bias", parameters.get("bias"))):
            if parameter is not None and key == "weight":
                fill = DISTRIBUTIONS[distribution]
                drawn.append((parameter, fill(torch.empty_like(parameter), generator=generator, **options)))
            elif parameter is not None and parameter.requires_grad:
                drawn.append((parameter, torch.zeros_like(parameter)))
    before = [target.detach().clone() for target, _ in drawn]
    try:
        with torch.no_grad():
            for target, values in drawn:
                target.copy_(values)
    except BaseException:
        with torch.no_grad():
            for (target, _), value in zip(drawn, before, strict=True):
                if not torch.equal(target, value):  # what was not written may not be writable
                    target.copy_(value)
        raise
    return InitializationResult(model, InitializationReport(tuple(plan.entries)))
