"""The data of the lab: MNIST and Fashion-MNIST, found, verified and loaded."""

from batchlab.lab.data.catalog import CATALOG, Dataset
from batchlab.lab.data.embedded import load_embedded
from batchlab.lab.data.idx import read_idx
from batchlab.lab.data.sources import load_dataset, locate_dataset
from batchlab.lab.data.split import hold_out

__all__ = ["CATALOG", "Dataset", "hold_out", "load_dataset", "load_embedded", "locate_dataset", "read_idx"]
