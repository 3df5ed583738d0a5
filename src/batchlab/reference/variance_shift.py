"""How much less an activation varies in evaluation than in training, because of dropout (Li et al. 2018).

Noise in front of a layer is there in training only. A batch norm behind the layer averages the variance with noise, and
in evaluation normalizes what has the variance without: X = Σ wᵢ nᵢ xᵢ, the xᵢ with mean c, variance v and pairwise
correlation ρ, the noise n independent of them with mean 1 and second moment s = E[n²]. With A = (Σ w)² / Σ w², the
paper's d cos²(θ):

    Var_train / Σ w² = s (c² + v) - c² + ρ v (A - 1)        Var_test / Σ w² = v + ρ v (A - 1)
"""

from __future__ import annotations

__all__ = ["dropout_second_moment", "uniform_second_moment", "variance_shift_ratio"]


def dropout_second_moment(p: float) -> float:
    """E[n²] = 1/(1 - p) of inverted dropout, and of Gaussian dropout.

    >>> dropout_second_moment(0.5)
    2.0
    """
    return 1 / (1 - p)


def uniform_second_moment(beta: float) -> float:
    """E[(1 + r)²] = 1 + beta²/3 for r ~ U(-beta, beta).

    >>> round(1 / uniform_second_moment(0.1), 5)
    0.99668
    """
    return 1 + beta**2 / 3


def variance_shift_ratio(
    mean: float,
    variance: float,
    second_moment: float,
    *,
    correlation: float = 0.0,
    alignment: float = 1.0,
    batchwise: bool = False,
) -> float:
    """Var_test / Var_train of a sum of inputs with noise.

    (v + ρ v (A - 1)) / (s (c² + v) - c² + ρ v (A - 1))

    batchwise:  the noise is the same for all samples of a batch, so within a batch it adds no variance around c:
                (v + ρ v (A - 1)) / (s v + ρ v (A - 1)), with the variance in a batch averaged over patterns

    Args:
        mean: c of the inputs.
        variance: v of the inputs.
        second_moment: s of the noise, see the functions above.
        correlation: ρ between any two inputs.
        alignment: A of the weights: 1 for a single input, dropout directly in front of the batch norm; d for d equal
            weights; about 1 for weights of random signs.
        batchwise: one pattern for a batch.

    Source: Li et al. 2018 (arXiv 1801.05134), cases (a) and (b); batchwise custom.

    >>> variance_shift_ratio(0.0, 1.0, dropout_second_moment(0.5))      # case (a): the share that is kept
    0.5
    """
    common = correlation * variance * (alignment - 1)
    noisy = second_moment * variance if batchwise else second_moment * (mean**2 + variance) - mean**2
    return (variance + common) / (noisy + common)
