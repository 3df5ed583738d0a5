"""batchlab: batch normalization and its relatives for PyTorch, a repair kit for models, and a lab.

`batchlab.nn` has the layers, `batchlab.functional` the functions under them, `batchlab.reference` the formulas,
`batchlab.surgery` what changes existing models. `batchlab.lab` (extra `lab`) runs the papers' experiments and is
not imported here.
"""

from batchlab import functional, nn, optim, reference, surgery

__all__ = ["__version__", "functional", "nn", "optim", "reference", "surgery"]
__version__ = "0.1.0"
