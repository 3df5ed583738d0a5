"""Public functions: each checks its arguments, chooses a backend and defines the gradient; no state of its own."""

from batchlab.functional.batch_norm import batch_norm, update_running_statistics
from batchlab.functional.drop_path import drop_path
from batchlab.functional.dropout import dropout, gaussian_dropout, uniform_dropout
from batchlab.functional.dropout_pattern import draw_pattern
from batchlab.functional.submatrix import submatrix, submatrix_conv
from batchlab.functional.submatrix_gradient import SubmatrixGradient
from batchlab.functional.submatrix_linear import submatrix_linear

__all__ = [
    "SubmatrixGradient",
    "batch_norm",
    "draw_pattern",
    "drop_path",
    "dropout",
    "gaussian_dropout",
    "submatrix",
    "submatrix_conv",
    "submatrix_linear",
    "uniform_dropout",
    "update_running_statistics",
]
