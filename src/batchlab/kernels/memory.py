"""What waits in the kernels' memory (`memory.hpp`: an instance in each compiled library), given back."""

from __future__ import annotations

from batchlab.kernels import batch_norm, submatrix

__all__ = ["release_memory"]


def release_memory() -> int:
    """Give the memory that waits for the kernels' next results back to the system; returns its bytes.

    Results in use are not touched. Kernels that were not used yet are not compiled for this.

    >>> from batchlab import functional, kernels
    >>> y = functional.batch_norm(torch.randn(64, 16, 32, 32), None, None, training=True)  # 4 MiB
    >>> del y  # the next result of this size takes its memory
    >>> waiting = kernels.release_memory()
    >>> kernels.release_memory()
    0
    """
    return batch_norm.release_memory() + submatrix.release_memory()
