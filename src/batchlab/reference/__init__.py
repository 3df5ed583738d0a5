"""What is computed: each mechanism in plain PyTorch, formula first, differentiable to any order."""

from batchlab.reference import (
    batch_norm,
    batch_renorm,
    batchwise_dropout,
    dropout,
    factored,
    ghost_batch_norm,
    initialization,
    mean_only_batch_norm,
    natural,
    noisy_batch_norm,
    path_norm,
    population_batch_norm,
    variance_only_batch_norm,
    variance_shift,
    whitening,
)

__all__ = [
    "batch_norm",
    "batch_renorm",
    "batchwise_dropout",
    "dropout",
    "factored",
    "ghost_batch_norm",
    "initialization",
    "mean_only_batch_norm",
    "natural",
    "noisy_batch_norm",
    "path_norm",
    "population_batch_norm",
    "variance_only_batch_norm",
    "variance_shift",
    "whitening",
]
