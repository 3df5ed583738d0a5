"""Layers: drop-in for `torch.nn`'s, with the same arguments, parameters and state-dict keys."""

from batchlab.nn import init
from batchlab.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchlab.nn.batchwise_dropout import BatchwiseDropout
from batchlab.nn.drop_path import DropPath
from batchlab.nn.dropout import Dropout, GaussianDropout, UniformDropout
from batchlab.nn.submatrix_sequential import SubmatrixSequential

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchwiseDropout",
    "DropPath",
    "Dropout",
    "GaussianDropout",
    "SubmatrixSequential",
    "UniformDropout",
    "init",
]
