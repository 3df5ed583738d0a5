"""Public functions: each checks its arguments, chooses a backend and defines the gradient; no state of its own."""

from batchlab.functional.batch_norm import batch_norm, update_running_statistics
from batchlab.functional.batch_renorm import batch_renorm
from batchlab.functional.drop_path import drop_path
from batchlab.functional.dropout import dropout, gaussian_dropout, uniform_dropout
from batchlab.functional.dropout_pattern import draw_pattern
from batchlab.functional.factored import factor_weight, factored_weight
from batchlab.functional.ghost_batch_norm import ghost_batch_norm
from batchlab.functional.mean_only_batch_norm import mean_only_batch_norm
from batchlab.functional.submatrix import submatrix, submatrix_conv
from batchlab.functional.submatrix_gradient import SubmatrixGradient
from batchlab.functional.submatrix_linear import submatrix_linear
from batchlab.functional.variance_only_batch_norm import variance_only_batch_norm
from batchlab.functional.whitening import update_whitening_statistics, whiten, whitening_matrix

__all__ = [
    "SubmatrixGradient",
    "batch_norm",
    "batch_renorm",
    "draw_pattern",
    "drop_path",
    "dropout",
    "factor_weight",
    "factored_weight",
    "gaussian_dropout",
    "ghost_batch_norm",
    "mean_only_batch_norm",
    "submatrix",
    "submatrix_conv",
    "submatrix_linear",
    "uniform_dropout",
    "update_running_statistics",
    "update_whitening_statistics",
    "variance_only_batch_norm",
    "whiten",
    "whitening_matrix",
]
