"""The same as `batchlab.reference`, fast: C++ on raw tensors, without modules and without gradients."""

from batchlab.kernels import submatrix

__all__ = ["submatrix"]
