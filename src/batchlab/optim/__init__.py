"""Optimizers that know the mechanisms, where torch's cannot, and what goes beside them."""

from batchlab.optim.natural import NaturalRefresh
from batchlab.optim.path_sgd import PathSGD
from batchlab.optim.submatrix_sgd import SubmatrixSGD

__all__ = [
    "NaturalRefresh",
    "PathSGD",
    "SubmatrixSGD",
]
