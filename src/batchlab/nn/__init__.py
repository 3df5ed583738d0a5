"""Layers: drop-in for `torch.nn`'s, with the same arguments, parameters and state-dict keys."""

from batchlab.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchlab.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from batchlab.nn.batchwise_dropout import BatchwiseDropout
from batchlab.nn.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from batchlab.nn.submatrix_sequential import SubmatrixSequential

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchwiseDropout",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "SubmatrixSequential",
]
