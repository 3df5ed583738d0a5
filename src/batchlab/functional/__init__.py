"""Public functions: each checks its arguments, chooses a backend and defines the gradient; no state of its own."""

from batchlab.functional.batch_norm import batch_norm, update_running_statistics
from batchlab.functional.dropout_pattern import draw_pattern
from batchlab.functional.factored import factor_weight, factored_weight
from batchlab.functional.submatrix import submatrix, submatrix_conv
from batchlab.functional.submatrix_gradient import SubmatrixGradient
from batchlab.functional.submatrix_linear import submatrix_linear

__all__ = [
    "SubmatrixGradient",
    "batch_norm",
    "draw_pattern",
    "factor_weight",
    "factored_weight",
    "submatrix",
    "submatrix_conv",
    "submatrix_linear",
    "update_running_statistics",
]
