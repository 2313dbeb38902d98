"""How alike the pictures of a video are, by the time between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

_GRID = (9, 16)
_LONGEST_CURVE = 60


class SelfSimilarity(NamedTuple):
    """Mean correlation of two pictures of a video against the time between them.

    Attributes:
        lags: float64 [L], seconds, evenly spaced.
        means: float64 [L], -1 to 1; 1 for pictures that are alike but for brightness and contrast. NaN where no
            picture that far from another has anything to be seen.
    """

    lags: Array
    means: Array


def describe(image: Array) -> Array:
    """A picture [H, W, 3] as its mean colours on a grid of 9 x 16, or fewer if it is smaller: a vector."""
    rows, columns = (
        np.linspace(0, size, min(parts, size) + 1).astype(int)
        for size, parts in zip(image.shape[:2], _GRID, strict=True)
    )
    sums = np.add.reduceat(np.add.reduceat(image, rows[:-1], axis=0), columns[:-1], axis=1)
    return (sums / (np.diff(rows)[:, None, None] * np.diff(columns)[:, None])).ravel()


def self_similarity(described: Array, seconds_apart: float, longest: float) -> SelfSimilarity:
    """Correlate every two pictures.

    Args:
        described: [N, D], from `describe`, evenly spaced in time.
        seconds_apart: time from one to the next.
        longest: no longer lag than this, in seconds.
    """
    centred = described - described.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1)
    # A picture of one colour is like nothing; rounding to 8 bits leaves a length of under a thousandth.
    seen = lengths > 1e-3
    unit = centred / np.where(seen, lengths, 1)[:, None]
    furthest = min(len(described) - 1, int(longest / seconds_apart))
    step = max(1, -(-furthest // _LONGEST_CURVE))
    lags = np.arange(step, furthest + 1, step)
    means = []
    for lag in lags:
        both = seen[lag:] & seen[:-lag]
        alike = (unit[lag:] * unit[:-lag]).sum(axis=1)[both]
        means.append(alike.mean() if len(alike) else np.nan)
    return SelfSimilarity(lags * seconds_apart, np.array(means))
