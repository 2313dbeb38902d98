"""How sure a mean is."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


def bootstrap_interval(values: Array, *, draws: int = 2000, seed: int = 0) -> tuple[Array, Array]:
    """95% interval of the mean over the first axis of `values` [N, ...], by resampling its N entries.

    Returns:
        Its lower and upper end, each [...].
    """
    chosen = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), (0.025, 0.975), axis=0)
    return low, high


def crossed_interval(values: Array, *, draws: int = 2000, seed: int = 0) -> tuple[Array, Array]:
    """95% interval of the mean over the first two axes of `values` [T, V, ...], trainings and videos, resampling both.

    With few trainings it tells how much they differ, but is too narrow to stand for all trainings there might be.

    Returns:
        Its lower and upper end, each [...].
    """
    generator = np.random.default_rng(seed)
    trainings = generator.integers(0, values.shape[0], (draws, values.shape[0], 1))
    videos = generator.integers(0, values.shape[1], (draws, 1, values.shape[1]))
    low, high = np.quantile(values[trainings, videos].mean(axis=(1, 2)), (0.025, 0.975), axis=0)
    return low, high
