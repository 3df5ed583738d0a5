"""Model in, changed model out: insert, recalibrate and fold batch normalization, in models of stock layers too."""

from batchlab.surgery.channel_pad import ChannelPad
from batchlab.surgery.fold import fold
from batchlab.surgery.fold_report import FoldEntry, FoldReport, FoldResult
from batchlab.surgery.insert_batch_norm import insert_batch_norm
from batchlab.surgery.recalibrate import recalibrate

__all__ = ["ChannelPad", "FoldEntry", "FoldReport", "FoldResult", "fold", "insert_batch_norm", "recalibrate"]
