"""The same as `batchlab.reference`, fast: C++ on raw tensors, without modules and without gradients."""

from typing import Final

from batchlab.kernels import batch_norm, submatrix
from batchlab.kernels.memory import release_memory
from batchlab.kernels.source import Source

__all__ = ["SOURCES", "batch_norm", "release_memory", "submatrix"]

SOURCES: Final[tuple[Source, ...]] = (batch_norm.SOURCE, batch_norm.AUTOGRAD, submatrix.SOURCE)
"""All that is ever compiled: what `batchlab build` builds and `batchlab info` shows."""
