"""Dropout with one pattern for the whole batch (Graham, Reizenstein & Robinson 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchlab.functional.dropout_pattern import check_rate, draw, inverted_scale
from batchlab.reference import batchwise_dropout as reference

__all__ = ["BatchwiseDropout"]


def _computing_again() -> bool:
    """Whether a backward pass is running: a checkpoint then repeats a forward, which must keep what it kept."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _own(kept: Tensor) -> Tensor:
    """The pattern without torch.func's wrapper, which is dead when its transform has ended."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return kept
    while torch._C._functorch.is_gradtrackingtensor(kept):
        kept = torch._C._functorch.get_unwrapped(kept)
    return kept


class BatchwiseDropout(nn.Module):
    """Drop the same features for all samples of a batch.

    training:    y = x · d · n/k        d: 1 at the k kept of n features, one pattern a batch (1/(1-p) for Bernoulli)
    evaluation:  y = x

    Alone it masks. Between the layers of a `SubmatrixSequential`, what it drops is not computed at all.

    The scaling is the inverted form, so evaluation needs none. The paper multiplies by 1 - p at test time instead,
    before the activation. The two agree where scaling passes through the activation (ReLU, leaky ReLU, PReLU,
    identity), with biases learned at the other scale; for sigmoid or tanh they are different networks.

    Patterns come from a generator on the CPU: a seed gives the same ones on any device and in compiled code. With
    torch's default generator `torch.utils.checkpoint` restores it, and computes again with the same pattern. A layer
    with a generator of its own then takes its latest pattern; finish a backward pass before the next forward there.

    Shapes:
        input, output: features in dimension `dim`; (N, C) or (N, C, *spatial) for the default.

    Args:
        p: share of features to drop, 0 to 1.
        exact: keep exactly round(n(1 - p)) features, a uniformly random subset; else each with probability 1 - p.
        generator: where patterns are drawn from; None: torch's default generator.
        dim: of the features; -1 for (N, L, C) as in transformers.

    Attributes:
        kept: indices of the features that the last batch kept, sorted int64; None before the first and in evaluation.

    Raises:
        ValueError: p is no probability, or the generator is not on the CPU; in forward, an input without `dim`.

    Source: Graham, Reizenstein & Robinson 2015, section 2.

    >>> import torch
    >>> layer = BatchwiseDropout(0.5, generator=torch.Generator().manual_seed(0))
    >>> layer(torch.ones(2, 6))
    tensor([[0., 0., 2., 2., 0., 2.],
            [0., 0., 2., 2., 0., 2.]])
    >>> layer.kept
    tensor([2, 3, 5])
    """

    def __init__(
        self, p: float = 0.5, *, exact: bool = True, generator: torch.Generator | None = None, dim: int = 1
    ) -> None:
        super().__init__()
        check_rate(p)
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(
                f"the generator is on {generator.device}; patterns are drawn on the CPU: torch.Generator()"
            )
        self.p = p
        self.exact = exact
        self.generator = generator
        self.dim = dim
        self.kept: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether it drops anything: in training, with p above 0."""
        return self.training and self.p > 0

    def train(self, mode: bool = True) -> BatchwiseDropout:
        """Switch between training and evaluation, which has no pattern."""
        if not mode:
            self.kept = None
        return super().train(mode)

    def draw(self, num_features: int, device: torch.device) -> tuple[Tensor, float]:
        """Draw a batch's pattern of `num_features` features; returns it, on `device`, and the factor of the kept."""
        kept = self.kept
        if self.generator is None or kept is None or not _computing_again():
            kept = _own(draw(num_features, self.p, self.exact, self.generator))
        if kept.device != device:
            kept = kept.to(device, non_blocking=True)
        return self.keep(kept, num_features)

    def keep(self, kept: Tensor, num_features: int) -> tuple[Tensor, float]:
        """Remember a batch's pattern; returns it, and the factor of the kept."""
        if torch.compiler.is_compiling():
            self.kept = kept
        else:
            self.__dict__["kept"] = kept  # nn.Module would look whether it is a parameter, twice a batch
        # A Bernoulli pattern's factor does not depend on how many it kept.
        return kept, inverted_scale(num_features, kept.shape[0] if self.exact else 0, self.p, self.exact)

    def keep_all(self, num_features: int, device: torch.device) -> None:
        """Remember that a batch kept all of its features."""
        self.kept = _own(torch.arange(num_features, device=device))

    def feature_dim(self, x: Tensor) -> int:
        """`dim`, counted from the front."""
        dim = self.dim if self.dim >= 0 else x.ndim + self.dim
        if not 0 <= dim < x.ndim:
            raise ValueError(
                f"input has shape {tuple(x.shape)}, without a dimension {self.dim} for the features; "
                "BatchwiseDropout(dim=...) says where they are"
            )
        return dim

    def forward(self, x: Tensor) -> Tensor:
        """Mask the input in training; return it as it is in evaluation."""
        if not self.training:
            self.kept = None
            return x
        dim = self.feature_dim(x)
        num_features = x.shape[dim]
        if self.p == 0:
            self.keep_all(num_features, x.device)
            return x
        return apply_mask(x, *self.draw(num_features, x.device), dim)

    def extra_repr(self) -> str:
        """p, then what is not at its default."""
        words = [f"p={self.p}"]
        if not self.exact:
            words.append("exact=False")
        if self.dim != 1:
            words.append(f"dim={self.dim}")
        return ", ".join(words)


def apply_mask(x: Tensor, kept: Tensor, scale: float, dim: int) -> Tensor:
    """The input times `scale` at kept features, times 0 elsewhere (inf and NaN become NaN, as in torch's dropout)."""
    shape = [1] * x.ndim
    shape[dim] = x.shape[dim]
    return x * reference.mask(kept, x.shape[dim], scale, x).view(shape)
