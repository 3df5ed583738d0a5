"""What each function of a network becomes when every coefficient is squared, for `path_norm`.

A linear function keeps its form, with its fixed coefficients squared as well: an average of k values has coefficients
1/k, and so is followed by another division by k. A positively homogeneous activation is the identity on the sums of
squares that pass through. A maximum is one of its values for each input; the paths through all of them count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CONSTANTS",
    "IN_PLACE",
    "ON_COEFFICIENTS",
    "PLAIN_FACTS",
    "PRODUCTS",
    "REASONS",
    "RULES",
    "SAME",
    "Unknown",
    "plain",
]


class Unknown(Exception):  # noqa: N818  # caught where the layer's name is known, and raised from there as ValueError
    """A function whose sums over paths are not defined."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PLAIN_FACTS = _words(
    "shape dtype device ndim layout size dim numel nelement stride is_contiguous is_floating_point is_complex len "
    "is_cuda is_cpu is_mps is_sparse is_quantized is_nested requires_grad is_leaf get_device element_size hash"
)
"""Questions about a tensor, not about its values."""

MOVES = _words(
    "view reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t T mT squeeze unsqueeze "
    "contiguous clone cat concat concatenate stack chunk split tensor_split unbind getitem narrow select flip roll "
    "expand expand_as broadcast_to repeat pixel_shuffle pixel_unshuffle channel_shuffle unfold view_as "
    "reshape_as"
)
"""Functions that put values elsewhere and change none."""

CONSTANTS = _words("zeros ones zeros_like ones_like new_zeros new_ones")
"""Constants that are their own squares."""

PRODUCTS = _words(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul rmatmul mm mv bmm "
    "mul rmul imul multiply"
)
"""Products, of which one side must be a parameter or a buffer and the other come from the input."""

SAME = _words("relu leaky_relu neg negative dropout dropout1d dropout2d dropout3d")
"""Functions that are the identity here."""

CASTS = _words("to type type_as float double half bfloat16 cuda cpu")

ON_COEFFICIENTS = MOVES | CASTS | {"mul", "rmul", "multiply"}
"""Functions that make coefficients of coefficients: the square of the result is the result of the squares."""

IN_PLACE = _words("add iadd sub isub mul imul div itruediv")

_NORMALIZED = (
    "it divides by a statistic of its input, so its output is no sum over paths; Path-SGD is for plain networks"
)
_CURVED = (
    "it is not positively homogeneous, so rescaling a unit changes the function, and path sums say nothing about it"
)
REASONS = (
    dict.fromkeys(
        _words("batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize"), _NORMALIZED
    )
    | dict.fromkeys(_words("softmax log_softmax softmin gumbel_softmax"), _NORMALIZED + "; leave it to the loss")
    | dict.fromkeys(
        _words(
            "sigmoid logsigmoid tanh gelu silu mish elu selu celu softplus softsign hardtanh relu6 hardswish "
            "hardsigmoid hardshrink softshrink tanhshrink threshold exp log pow square sqrt alpha_dropout"
        ),
        _CURVED,
    )
    | dict.fromkeys(
        _words("scaled_dot_product_attention multi_head_attention_forward bilinear"),
        "it multiplies values by values, and a path has one weight for an edge",
    )
    | dict.fromkeys(_words("lstm gru rnn_tanh rnn_relu"), "recurrent networks cross a weight many times in one path")
    | {
        "prelu": "its slopes act on negative values alone and have no share in sums of squares; use LeakyReLU",
        "embedding": "it takes indices, and the path norm is a sum over all inputs; use one-hot inputs and Linear",
    }
)


def _inplace(name: str, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("inplace", False)) or (name.endswith("_") and not name.endswith("__"))


def same(func: Callable[..., Any], x: Tensor, *_: Any, **kwargs: Any) -> Tensor:
    """The identity; a tensor of its own where the function would return one."""
    return x if _inplace(func.__name__, kwargs) else x.clone()


def uncast(_func: Callable[..., Any], x: Tensor, *_: Any, **__: Any) -> Tensor:
    """The pass stays in float64, whatever the network is cast to."""
    return x


def plain(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function itself."""
    return func(*args, **kwargs)


def square(factor: Any) -> Any:
    """A number, or integers, squared; what has fractions is made of squares already."""
    return factor if isinstance(factor, Tensor) and factor.is_floating_point() else factor * factor


def add(_func: Callable[..., Any], x: Any, other: Any, *, alpha: float = 1) -> Any:
    """Sums: x ± alpha · other has coefficients 1 and ± alpha."""
    return square(x) + square(alpha) * square(other)


def multiply(_func: Callable[..., Any], x: Any, other: Any) -> Any:
    """A number as a coefficient, or a parameter or buffer."""
    return square(x) * square(other)


def divide(_func: Callable[..., Any], x: Tensor, other: Any) -> Tensor:
    """Division by a number is a coefficient."""
    if isinstance(other, Tensor):
        raise Unknown("it divides by a tensor; multiply by a parameter or buffer")
    y: Tensor = x / square(other)
    return y


def mean(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Mean of n values: coefficients 1/n, squared 1/n²."""
    kwargs.pop("dtype", None)
    y: Tensor = func(x, *args, **kwargs)
    return y * (y.numel() / max(x.numel(), 1))


def pad(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Zeros, or copies of values."""
    value = args[2] if len(args) > 2 else kwargs.get("value")
    if value:
        raise Unknown(f"it pads with {value}, a bias at the edge that no parameter holds; pad with 0")
    return func(x, *args, **kwargs)


def max_pool(
    func: Callable[..., Any],
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """The sum over each window."""
    if return_indices or any(step != 1 for step in torch.atleast_1d(torch.as_tensor(dilation)).tolist()):
        raise Unknown("max pooling with indices or dilation is not known here; pool without")
    return _sums(int(func.__name__[-2]), x, kernel_size, stride, padding, ceil_mode)


def _sums(dims: int, x: Tensor, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool) -> Tensor:
    stride = kernel_size if stride is None or stride == [] or stride == () else stride
    if dims > 1:
        pool: Any = F.avg_pool2d if dims == 2 else F.avg_pool3d
        y: Tensor = pool(x, kernel_size, stride, padding, ceil_mode, divisor_override=1)
        return y
    size, step, edge = (int(torch.as_tensor(value).reshape(-1)[0]) for value in (kernel_size, stride, padding))
    wide = F.avg_pool2d(x.unsqueeze(-2), (1, size), (1, step), (0, edge), ceil_mode, divisor_override=1)
    return wide.squeeze(-2)


def avg_pool(
    func: Callable[..., Any],
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Sums divided by the square of each window's divisor, which is smaller at some edges."""
    extra = () if divisor_override is None else (divisor_override,)
    options = (kernel_size, stride, padding, ceil_mode, count_include_pad, *extra)
    if stride is None or stride == ():
        options = (kernel_size, kernel_size, *options[2:])
    dims = int(func.__name__[-2])
    ones = torch.ones_like(x)
    inverse = func(ones, *options) / _sums(dims, ones, kernel_size, stride, padding, ceil_mode)
    y: Tensor = func(x, *options) * inverse
    return y


def _lengths(inputs: int, outputs: int) -> list[int]:
    """How many values each output of an adaptive pool has: from ⌊i n/m⌋ to ⌈(i+1) n/m⌉."""
    return [-(-(i + 1) * inputs // outputs) - i * inputs // outputs for i in range(outputs)]


def adaptive_pool(func: Callable[..., Any], x: Tensor, output_size: Any, *args: Any, **kwargs: Any) -> Tensor:
    """An average has 1/n² for its window of n values, a maximum the sum."""
    if kwargs.get("return_indices") or any(args):
        raise Unknown("max pooling with indices is not known here; pool without")
    dims = int(func.__name__[-2])
    average: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 1]
    y: Tensor = average(x, output_size)
    power = 1 if "max" in func.__name__ else -1
    for dim in range(-dims, 0):
        lengths = torch.tensor(_lengths(x.shape[dim], y.shape[dim]), dtype=x.dtype, device=x.device)
        y = y * (lengths**power).view([-1] + [1] * (-dim - 1))
    return y


RULES: dict[str, Callable[..., Any]] = (
    dict.fromkeys(MOVES | PRODUCTS | {"sum"}, plain)
    | dict.fromkeys(SAME, same)
    | dict.fromkeys(CASTS, uncast)
    | dict.fromkeys(("add", "radd", "iadd", "sub", "rsub", "isub", "subtract"), add)
    | dict.fromkeys(("mul", "rmul", "imul", "multiply"), multiply)
    | dict.fromkeys(("div", "truediv", "itruediv", "divide", "true_divide"), divide)
    | dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), max_pool)
    | dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), avg_pool)
    | dict.fromkeys((f"adaptive_{kind}_pool{dims}d" for kind in ("avg", "max") for dims in (1, 2, 3)), adaptive_pool)
    | {"mean": mean, "pad": pad}
)
