"""A residual block that computes its branch only for the samples that keep it (Huang et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from batchlab.functional.drop_path import drop_path
from batchlab.functional.dropout_pattern import check_rate

__all__ = ["DropPath"]


class DropPath(nn.Module):
    """Add a branch to its input, and in training skip it for a random part of the samples (stochastic depth).

    training:    y = x;   y[kept] += branch(x[kept]) · N/k        k kept of N samples (1/(1-p) for Bernoulli)
    evaluation:  y = x + branch(x)

    The branch runs on k rows instead of running on N and being multiplied by zeros: its work and the activations that
    wait for the backward pass fall to k/N. For a branch that treats samples one by one, output and gradients are those
    of the masked computation. Batch normalization inside the branch takes its statistics over the kept samples, so it
    sees k samples a batch, as it would not with a mask; dropout inside draws for k samples.

    Exact keeps round(N(1 - p)) samples, at least one, so a batch of one always keeps its sample, with factor 1. With
    Bernoulli no sample may be kept: then the branch does not run, and its parameters get no gradient (which
    DistributedDataParallel has to be told: find_unused_parameters=True). The same for p = 1.

    Samples are drawn from torch's default generator on the CPU: a seed gives the same ones on any device, and
    `torch.utils.checkpoint` repeats them. The branch must not write into its input.

    Shapes:
        input, output: (N, ...); the branch keeps the shape.

    Args:
        branch: the module to skip; its state-dict keys begin with "branch.".
        p: share of samples that skip it, 0 to 1.
        exact: skip a fixed number of samples; else each with probability p.

    Raises:
        TypeError: the branch is no module; in forward, it does not return a tensor.
        ValueError: p is no probability; in forward, the branch changes the shape.

    Source: Huang et al. 2016 (arXiv 1603.09382), section 3, per sample; skipping rows and the fixed number custom.

    >>> import torch
    >>> block = DropPath(torch.nn.Linear(8, 8), p=0.25)
    >>> x = torch.randn(12, 8)
    >>> y = block(x)
    >>> int((y != x).any(1).sum())
    9
    >>> torch.equal(block.eval()(x), x + block.branch(x))
    True
    """

    def __init__(self, branch: nn.Module, p: float = 0.5, *, exact: bool = True) -> None:
        super().__init__()
        check_rate(p)
        if not isinstance(branch, nn.Module):
            raise TypeError(f"branch is a {type(branch).__name__}; it must be a torch.nn.Module, such as nn.Sequential")
        self.branch = branch
        self.p = p
        self.exact = exact

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the input plus the branch, in training for the samples that keep it."""
        return drop_path(input, self.branch, self.p, self.training, exact=self.exact)

    def extra_repr(self) -> str:
        """p, then what is not at its default."""
        return f"p={self.p}" + ("" if self.exact else ", exact=False")
