"""Initial variance of weights between rectifiers (He et al. 2015, section 2.2, equations 10, 14 and 15).

A layer's output is a sum of `terms` products of weights and inputs. A rectifier f(y) = max(0, y) + a min(0, y) in front
of it makes E[f(y)²] = (1 + a²)/2 Var[y] for symmetric y; noise with mean 1 in front of it, such as inverted dropout
that keeps a share `keep`, makes it 1/keep times as large. The variance is the same from layer to layer if

    (1 + a²)/2 · terms · Var[w] / keep = 1

Backward the same holds for gradients, with the terms of the sum over a layer's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["terms", "weight_variance"]


def terms(
    shape: Sequence[int], mode: str, *, groups: int = 1, transposed: bool = False, stride: Sequence[int] = ()
) -> float:
    """How many products each output of a layer sums up (forward), or each gradient of an input (backward).

    forward:   k² c_in / groups      (divided by the product of the strides where transposed)
    backward:  k² c_out / groups     (divided by the product of the strides where not transposed)

    A stride s leaves out all but one of s positions, so that an input is used by 1/s of the kernel's entries on
    average. Borders are not counted: padding leaves fewer terms there.

    Shapes:
        shape: of the weight, (c_out, c_in/groups, *kernel), or (c_in, c_out/groups, *kernel) where transposed.

    >>> terms((64, 32, 3, 3), "forward"), terms((64, 32, 3, 3), "backward")
    (288.0, 576.0)
    """
    kernel = math.prod(shape[2:])
    first, second = shape[0] / groups * kernel, shape[1] * kernel
    if (mode == "forward") is transposed:
        return first / math.prod(stride)
    return float(second)


def weight_variance(terms: float, negative_slope: float, keep: float) -> float:
    """Var[w] = 2 keep / ((1 + negative_slope²) terms).

    >>> weight_variance(100, 0.0, 1.0), weight_variance(100, 1.0, 0.5)
    (0.02, 0.005)
    """
    return 2 * keep / ((1 + negative_slope**2) * terms)
