"""Layers: drop-in for `torch.nn`'s, with the same arguments, parameters and state-dict keys."""

from batchlab.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchlab.nn.batchwise_dropout import BatchwiseDropout
from batchlab.nn.factored import FactoredConv1d, FactoredConv2d, FactoredConv3d, FactoredLinear
from batchlab.nn.submatrix_sequential import SubmatrixSequential

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchwiseDropout",
    "FactoredConv1d",
    "FactoredConv2d",
    "FactoredConv3d",
    "FactoredLinear",
    "SubmatrixSequential",
]
