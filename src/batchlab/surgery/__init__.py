"""Model in, changed model out: batch norm put in, recalibrated, folded; dropout, factors, first weights, groups."""

from batchlab.surgery.channel_pad import ChannelPad
from batchlab.surgery.fold import fold
from batchlab.surgery.fold_report import FoldEntry, FoldReport, FoldResult
from batchlab.surgery.initialization import initialize
from batchlab.surgery.initialization_report import InitializationEntry, InitializationReport, InitializationResult
from batchlab.surgery.initialize_from_data import initialize_from_data
from batchlab.surgery.insert_batch_norm import insert_batch_norm
from batchlab.surgery.merge_factored import merge_factored
from batchlab.surgery.merge_natural import merge_natural
from batchlab.surgery.parameter_groups import parameter_groups
from batchlab.surgery.recalibrate import recalibrate
from batchlab.surgery.to_batchwise_dropout import to_batchwise_dropout
from batchlab.surgery.to_factored import to_factored
from batchlab.surgery.to_natural import to_natural

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
    "initialize_from_data",
    "insert_batch_norm",
    "merge_factored",
    "merge_natural",
    "parameter_groups",
    "recalibrate",
    "to_batchwise_dropout",
    "to_factored",
    "to_natural",
]
