"""A chain of layers that computes only what its dropouts keep."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from torch import Tensor, nn

from batchlab.functional.submatrix import transformed
from batchlab.nn.break_even import faster_mode
from batchlab.nn.submatrix_layers import Step, flatten
from batchlab.nn.submatrix_plan import describe
from batchlab.nn.submatrix_run import run_masked, run_submatrix

__all__ = ["MODES", "SubmatrixSequential"]

MODES: Final = ("auto", "submatrix", "mask")


class SubmatrixSequential(nn.Sequential):
    """An `nn.Sequential` in which dropped features are never computed.

    y = W[d₁, d₀] x[d₀] + b[d₁]   for each linear or convolution layer, d₀ and d₁ the patterns before and behind it

    Every `BatchwiseDropout` in the chain draws one pattern a batch. The linear or convolution layer before it computes
    kept outputs only, the one after it reads kept inputs only, and what lies between works on kept features: batch
    norm (kept channels' parameters and running statistics, the others rest), elementwise activations, PReLU, pooling,
    Flatten (a dropped feature map takes its whole block along), nested Sequentials. A first dropout leaves out input
    features. Outputs and gradients are those of the same chain with masks; gradients of what was dropped are zero.

    What cannot work on kept features (a subclass, a layer with hooks, an activation with f(0) ≠ 0 behind a dropout,
    a batch norm behind one, grouped convolutions, ...) gets all features, with zeros at the dropped ones. `repr` says
    for each dropout what it saves. Children that work on kept rows and columns are not called themselves.

    In evaluation, and without an active dropout, it is `nn.Sequential`; state-dict keys are always the same.

    Shapes:
        input, output: as the chain's with masks.

    Args:
        modules: as for `nn.Sequential`.
        mode: "submatrix", "mask" (the same results from dense layers and masks), or "auto": at the first batch of a
            size, a copy of the chain is trained for a few steps in both modes, and the faster one serves from then
            on. The two round differently; name one where runs must repeat to the last bit.

    Raises:
        ValueError: an unknown mode.

    Source: Graham, Reizenstein & Robinson 2015, section 2.

    >>> import torch
    >>> from torch import nn
    >>> from batchlab.nn import BatchwiseDropout
    >>> SubmatrixSequential(nn.Linear(784, 800), nn.ReLU(), BatchwiseDropout(0.5), nn.Linear(800, 10))
    SubmatrixSequential(
      mode='auto'
      dropout 2 leaves out rows of 0 and columns of 3
      (0): Linear(in_features=784, out_features=800, bias=True)
      (1): ReLU()
      (2): BatchwiseDropout(p=0.5)
      (3): Linear(in_features=800, out_features=10, bias=True)
    )
    """

    def __init__(self, *modules: nn.Module | OrderedDict[str, nn.Module], mode: str = "auto") -> None:
        super().__init__(*modules)  # type: ignore[arg-type]
        self.mode = mode
        self._faster: dict[Any, str] = {}

    @property
    def mode(self) -> str:
        """One of "submatrix", "mask" and "auto"."""
        return self._mode

    @mode.setter
    def mode(self, value: str) -> None:
        if value not in MODES:
            raise ValueError(f"mode is {value!r}; allowed are {', '.join(map(repr, MODES))}")
        self._mode = value

    def __getitem__(self, index: Any) -> Any:
        """One module, or for a slice a chain of them, in the same mode."""
        found: Any = super().__getitem__(index)
        if isinstance(index, slice):
            found.mode = self._mode
        return found

    def steps(self) -> list[Step]:
        """The modules in the order in which they run, those of nested Sequentials included."""
        return flatten(self, CHAINS)

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain."""
        steps = self.steps()
        active = [module for _, module, kind in steps if kind == "dropout" and module.training and module.p > 0]
        if not active:
            return super().forward(x)  # type: ignore[no-untyped-call, no-any-return]
        mode = self._mode
        if mode == "auto":
            mode = "submatrix" if transformed() else faster_mode(self, active, x, self._faster)
        return run_submatrix(steps, x) if mode == "submatrix" else run_masked(steps, x)

    def extra_repr(self) -> str:
        """The mode, then what each dropout saves."""
        steps = self.steps()
        if not any(kind == "dropout" for _, _, kind in steps):
            return ""  # there is nothing to choose
        return "\n".join([f"mode={self._mode!r}", *describe(steps)])


CHAINS: Final = frozenset({nn.Sequential, SubmatrixSequential})
"""Containers whose insides are part of the chain."""
