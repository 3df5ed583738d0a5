"""What is computed: each mechanism in plain PyTorch, formula first, differentiable to any order."""

from batchlab.reference import batch_norm, batchwise_dropout, factored

__all__ = ["batch_norm", "batchwise_dropout", "factored"]
