"""Whitening computed slowly in numpy's float64, along other ways than the library's: singular values, loops, P³."""

import math

import numpy as np
import torch
from torch import Tensor


def samples_of(x: Tensor) -> np.ndarray:
    """One row per sample and position, one column per channel."""
    return x.detach().double().movedim(1, -1).reshape(-1, x.shape[1]).numpy()


def loop_covariance(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased covariance of each pair of channels by exact summation."""
    n, channels = rows.shape
    mean = np.array([math.fsum(rows[:, i]) / n for i in range(channels)])
    centered = rows - mean
    sigma = np.array(
        [[math.fsum(centered[:, i] * centered[:, j]) / n for j in range(channels)] for i in range(channels)]
    )
    return mean, sigma


def zca_by_singular_values(rows: np.ndarray, eps: float) -> np.ndarray:
    """Whitened rows without ever forming a covariance: singular values s of the centered data, s²/n + eps."""
    left, values, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return (left * (values / np.sqrt(values**2 / len(rows) + eps))) @ right


def cholesky_by_loops(sigma: np.ndarray, eps: float) -> np.ndarray:
    """L⁻¹ by the schoolbook loops."""
    size = len(sigma)
    a = sigma + eps * np.eye(size)
    factor = np.zeros_like(a)
    for i in range(size):
        for j in range(i + 1):
            rest = a[i, j] - math.fsum(factor[i, :j] * factor[j, :j])
            factor[i, j] = math.sqrt(rest) if i == j else rest / factor[j, j]
    inverse = np.zeros_like(a)
    for j in range(size):
        for i in range(j, size):
            inverse[i, j] = ((i == j) - math.fsum(factor[i, j:i] * inverse[j:i, j])) / factor[i, i]
    return inverse


def newton_by_the_paper(sigma: np.ndarray, eps: float, iterations: int) -> np.ndarray:
    """P ← (3 P - P³ Σ/tr Σ)/2, as it is printed."""
    a = sigma + eps * np.eye(len(sigma))
    trace = np.trace(a)
    p = np.eye(len(sigma))
    for _ in range(iterations):
        p = (3 * p - p @ p @ p @ (a / trace)) / 2
    return p / np.sqrt(trace)


def whitened(x: Tensor, method: str, eps: float, group_size: int | None = None, iterations: int = 5) -> np.ndarray:
    """All samples of `x`, whitened group by group, as `samples_of` sorts them."""
    rows = samples_of(x)
    size = group_size or rows.shape[1]
    parts = []
    for start in range(0, rows.shape[1], size):
        part = rows[:, start : start + size]
        if method == "zca":
            parts.append(zca_by_singular_values(part, eps))
            continue
        mean, sigma = loop_covariance(part)
        matrix = cholesky_by_loops(sigma, eps) if method == "cholesky" else newton_by_the_paper(sigma, eps, iterations)
        parts.append((part - mean) @ matrix.T)
    return np.concatenate(parts, axis=1)


def correlated(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    """A float64 input with correlated channels in dimension 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    mix = torch.randn(shape[1], shape[1], dtype=torch.float64, generator=generator) / math.sqrt(shape[1])
    return torch.einsum("ij,nj...->ni...", mix + 0.5 * torch.eye(shape[1], dtype=torch.float64), x) + mean
