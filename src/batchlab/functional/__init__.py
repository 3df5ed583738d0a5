"""Public functions: each checks its arguments, chooses a backend and defines the gradient; no state of its own."""

from batchlab.functional.batch_norm import batch_norm, update_running_statistics
from batchlab.functional.dropout_pattern import draw_pattern
from batchlab.functional.submatrix import submatrix, submatrix_conv
from batchlab.functional.submatrix_gradient import SubmatrixGradient
from batchlab.functional.submatrix_linear import submatrix_linear
from batchlab.functional.whitening import update_whitening_statistics, whiten, whitening_matrix

__all__ = [
    "SubmatrixGradient",
    "batch_norm",
    "draw_pattern",
    "submatrix",
    "submatrix_conv",
    "submatrix_linear",
    "update_running_statistics",
    "update_whitening_statistics",
    "whiten",
    "whitening_matrix",
]
