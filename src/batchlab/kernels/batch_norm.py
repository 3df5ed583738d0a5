"""Batch norm with its residual and its activation, two passes over memory forward and two backward.

On the CPU in C++; the same operations on the GPU are `batch_norm_cuda`'s, in Triton, where that is installed.

Bytes, with s the size of the input: forward reads s, reads it again (from the cache, where a tile of channels fits),
and writes s; backward reads the gradient and the input, both again, and writes s. The limit is 2 s forward and 3 s
backward, two and a half copies. Saved are the input, weight, bias and three numbers a channel; where there is a
residual and an activation also a bit a number (a ReLU or a leaky one), the output (a sigmoid) or the residual (SiLU).
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Final

import torch
from torch import Tensor

from batchlab.kernels.batch_norm_fake import describe_results
from batchlab.kernels.build import build, load, say
from batchlab.kernels.source import Source

__all__ = [
    "ACTIVATIONS",
    "LIBRARY",
    "available",
    "available_on_cuda",
    "backward",
    "evaluate",
    "forward",
    "gradient_sums",
    "is_dense",
    "moments",
    "release_memory",
]

DTYPES: Final = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
ACTIVATIONS: Final[dict[str | None, int]] = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "sigmoid": 4}
SOURCE: Final = Source(Path(__file__).with_name("batch_norm.cpp"))
AUTOGRAD: Final = Source(Path(__file__).with_name("batch_norm_autograd.cpp"), flags=("-O2",))

_REGISTERING = Lock()
_LOADING = Lock()
"""Threads, one for each GPU, may come here first together, and an operation is registered once."""


def _open_locks() -> None:
    """A process that forks while another of its threads compiles would leave the child a lock that never opens."""
    global _REGISTERING, _LOADING
    _REGISTERING, _LOADING = Lock(), Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_locks)

LIBRARY: Final = torch.library.Library("batchlab_batch_norm", "FRAGMENT")
LIBRARY.define(
    "differentiable_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, Tensor? output, "
    "Tensor? residual, Tensor? statistics, float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor)"
)
"""What the compiled node calls for gradients that are differentiated again; `batchlab.functional` has its formula."""


@cache
def _load() -> bool:
    with _LOADING:  # of threads that come together the second finds what the first one did
        return _load_once()


@cache
def _load_once() -> bool:
    first = Lock()  # one line for both

    def announce(line: str) -> None:
        if first.acquire(blocking=False):
            say(line)

    try:
        with ThreadPoolExecutor() as pool:  # the compiler is another process; two of them, where there are two cores
            libraries = list(pool.map(lambda source: build(source, announce), (SOURCE, AUTOGRAD)))
        for library in libraries:
            load(library)
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"batchlab: {error}. Batch norm takes PyTorch's own operations instead: right, but slower. Install a C++ "
            "compiler, or set CXX to one.",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    describe_results()
    return True


def available() -> bool:
    """Whether the compiled kernels are loaded; tries to build them once, and warns once if that fails."""
    return _load()


# torch.compile is to call it and not to look into it: `torch.compiler.assume_constant_result`, whose import of the
# compiler would take a second of everybody's.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _load_for_cuda() -> bool:
    if not torch.cuda.is_available() or find_spec("triton") is None or not available():
        return False
    from batchlab.kernels import batch_norm_cuda  # imports triton

    batch_norm_cuda.register(LIBRARY)
    return True


def available_on_cuda() -> bool:
    """Whether the operations take tensors on the GPU: there is one, with triton, and the compiled library is loaded.

    Autograd's node and the operations' names are the compiled library's.
    """
    with _REGISTERING:
        return _load_for_cuda()


available_on_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_dense(x: Tensor) -> bool:
    """Whether the kernels take these strides: contiguous, or channels innermost and the rest contiguous."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """The output, and (3, C): mean, what its rounding lost / √(var + eps), 1/√(var + eps).

    Running statistics move in place and the number of batches grows by one, where they are given and a channel has two
    values or more. `x` is dense (`is_dense`), `residual` has its shape, dtype and strides; vectors of channels are
    contiguous, in float32 (float64 for such an x).
    """
    found: tuple[Tensor, Tensor] = torch.ops.batchlab_batch_norm.forward_.default(
        x, weight, bias, residual, running_mean, running_var, num_batches_tracked, momentum, eps, activation
    )
    return found


def evaluate(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """The output with given mean and biased variance, in float32 or float64, and the numbers as `forward` has them.

    Differentiable for all but mean and variance.
    """
    found: tuple[Tensor, Tensor] = torch.ops.batchlab_batch_norm.evaluate.default(
        x, mean, variance, weight, bias, residual, eps, activation
    )
    return found


def moments(x: Tensor) -> Tensor:
    """(2, C) in float64: mean and biased variance of each channel."""
    return torch.ops.batchlab_batch_norm.moments.default(x)  # type: ignore[no-any-return]


def gradient_sums(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    activation: int,
) -> Tensor:
    """(2, C) in float64: Σ g and Σ g (x - mean), with g the gradient in front of the activation."""
    return torch.ops.batchlab_batch_norm.gradient_sums.default(  # type: ignore[no-any-return]
        gradient, x, weight, bias, output, residual, saved, activation
    )


def backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    activation: int,
    *,
    sums: Tensor | None = None,
    count: float = 0.0,
    residual_needed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, residual, weight and bias.

    With a residual behind an activation, what went into that is found from the `output` (a (leaky) ReLU, a sigmoid),
    or from the `residual` (SiLU). (Autograd's node on the CPU keeps a `relu_mask` instead of the output of a ReLU;
    compilers see the output.) The residual's gradient is empty where it is not needed, or is `gradient` itself:
    without an activation.

    Args:
        gradient: of the output.
        x: the input.
        weight: as `forward` or `evaluate` was given it.
        bias: likewise.
        output: what the forward pass returned, or None.
        residual: what was added, or None.
        saved: the numbers that `forward` or `evaluate` returned.
        activation: its number.
        sums: those of `gradient_sums` over all ranks; None: this input's own.
        count: how many values the statistics are of: 0 for this input's own, infinity if they were given.
        residual_needed: whether the residual's gradient is wanted.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.batchlab_batch_norm.backward.default(
        gradient, x, weight, bias, output, residual, saved, sums, count, activation, residual_needed
    )
    return found


def release_memory() -> int:
    """Give the memory that waits for the next results back to the system; returns its bytes."""
    if not hasattr(torch.ops.batchlab_batch_norm, "release_memory"):
        return 0  # not in use yet: nothing waits, and nothing is compiled to say so
    return int(torch.ops.batchlab_batch_norm.release_memory.default())
