"""Public functions: each checks its arguments, chooses a backend and defines the gradient; no state of its own."""

from batchlab.functional.batch_norm import batch_norm, update_running_statistics

__all__ = ["batch_norm", "update_running_statistics"]
