"""Optimizers that know the mechanisms, where torch's cannot."""

from batchlab.optim.path_sgd import PathSGD
from batchlab.optim.submatrix_sgd import SubmatrixSGD

__all__ = ["PathSGD", "SubmatrixSGD"]
