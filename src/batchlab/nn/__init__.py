"""Layers: drop-in for `torch.nn`'s, with the same arguments, parameters and state-dict keys."""

from batchlab.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchlab.nn.batchwise_dropout import BatchwiseDropout
from batchlab.nn.submatrix_sequential import SubmatrixSequential
from batchlab.nn.whitening import Whitening1d, Whitening2d, Whitening3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchwiseDropout",
    "SubmatrixSequential",
    "Whitening1d",
    "Whitening2d",
    "Whitening3d",
]
