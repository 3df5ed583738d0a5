"""Model in, changed model out: insert, recalibrate, fold batch normalization; batchwise dropout; optimizer groups."""

from batchlab.surgery.channel_pad import ChannelPad
from batchlab.surgery.fold import fold
from batchlab.surgery.fold_report import FoldEntry, FoldReport, FoldResult
from batchlab.surgery.initialization import initialize
from batchlab.surgery.initialization_report import InitializationEntry, InitializationReport, InitializationResult
from batchlab.surgery.insert_batch_norm import insert_batch_norm
from batchlab.surgery.parameter_groups import parameter_groups
from batchlab.surgery.recalibrate import recalibrate
from batchlab.surgery.to_batchwise_dropout import to_batchwise_dropout

__all__ = [
    "ChannelPad",
    "FoldEntry",
    "FoldReport",
    "FoldResult",
    "InitializationEntry",
    "InitializationReport",
    "InitializationResult",
    "fold",
    "initialize",
    "insert_batch_norm",
    "parameter_groups",
    "recalibrate",
    "to_batchwise_dropout",
]
