"""Layers: drop-in for `torch.nn`'s, with the same arguments, parameters and state-dict keys."""

from batchlab.nn import init
from batchlab.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchlab.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from batchlab.nn.batchwise_dropout import BatchwiseDropout
from batchlab.nn.drop_path import DropPath
from batchlab.nn.dropout import Dropout, GaussianDropout, UniformDropout
from batchlab.nn.factored import FactoredConv1d, FactoredConv2d, FactoredConv3d, FactoredLinear
from batchlab.nn.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from batchlab.nn.mean_only_batch_norm import MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from batchlab.nn.natural import NaturalLinear
from batchlab.nn.noisy_batch_norm import NoisyBatchNorm1d, NoisyBatchNorm2d, NoisyBatchNorm3d
from batchlab.nn.population_batch_norm import PopulationBatchNorm1d, PopulationBatchNorm2d, PopulationBatchNorm3d
from batchlab.nn.submatrix_sequential import SubmatrixSequential
from batchlab.nn.variance_only_batch_norm import (
    VarianceOnlyBatchNorm1d,
    VarianceOnlyBatchNorm2d,
    VarianceOnlyBatchNorm3d,
)
from batchlab.nn.whitening import Whitening1d, Whitening2d, Whitening3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchwiseDropout",
    "DropPath",
    "Dropout",
    "FactoredConv1d",
    "FactoredConv2d",
    "FactoredConv3d",
    "FactoredLinear",
    "GaussianDropout",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "MeanOnlyBatchNorm1d",
    "MeanOnlyBatchNorm2d",
    "MeanOnlyBatchNorm3d",
    "NaturalLinear",
    "NoisyBatchNorm1d",
    "NoisyBatchNorm2d",
    "NoisyBatchNorm3d",
    "PopulationBatchNorm1d",
    "PopulationBatchNorm2d",
    "PopulationBatchNorm3d",
    "SubmatrixSequential",
    "UniformDropout",
    "VarianceOnlyBatchNorm1d",
    "VarianceOnlyBatchNorm2d",
    "VarianceOnlyBatchNorm3d",
    "Whitening1d",
    "Whitening2d",
    "Whitening3d",
    "init",
]
