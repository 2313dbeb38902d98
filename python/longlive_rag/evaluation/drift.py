"""How far a video has drifted from its own beginning, measured on its pixels alone.

Every metric is a number per frame; drift is the relative change of its mean from the first segment of the video to
the last. No metric says by itself that a video is bad: a scene that moves changes them all. They are for comparing
videos of one prompt and seed, where autoregressive drift shows as sharpness and colour detail that only grow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from longlive_rag.generation.video import Frames

METRICS = {
    "sharpness": "mean absolute Laplacian of the grey image, at a 120th of its height",
    "saturation": "mean HSV saturation",
    "contrast": "standard deviation of the grey image",
    "mean": "mean over pixels and channels",
    "high_frequency": "mean absolute difference of the grey image from its 3 x 3 binomial blur, at full resolution",
    "color_detail": "mean absolute Laplacian of red - green and blue - green, at a 120th of the height",
    "motion": "mean absolute difference from the frame before",
}
SEGMENT_FRAMES = 48

# Below half a step of 8-bit video, averaged over a whole frame, a metric is rounding, and its relative change is noise.
_NOTHING = 0.5 / 255 / 100
_LATTICE_ROWS = 120

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Drift:
    """Metrics of one video over time.

    Attributes:
        values: float64 [frames, metrics] in the order of `METRICS`, pixels scaled to 0..1.
            The first frame has no motion (NaN).
        segment_frames: length of the first and last segment.
        first_frame, last_frame: uint8 [H, W, 3].
    """

    values: np.ndarray[Any, np.dtype[np.float64]]
    segment_frames: int
    first_frame: Frames
    last_frame: Frames

    @property
    def first(self) -> dict[str, float]:
        """Mean of each metric over the first segment."""
        return self._means(self.values[: self.segment_frames])

    @property
    def last(self) -> dict[str, float]:
        """Mean of each metric over the last segment."""
        return self._means(self.values[-self.segment_frames :])

    @property
    def change(self) -> dict[str, float | None]:
        """Relative change of each metric, 0.41 for +41%; None where the first segment has nothing to compare with."""
        first, last = self.first, self.last
        return {name: last[name] / first[name] - 1 if first[name] > _NOTHING else None for name in METRICS}

    @staticmethod
    def _means(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
        return dict(zip(METRICS, np.nanmean(values, axis=0).tolist(), strict=True))


def measure_drift(images: Iterable[Frames], segment_frames: int = SEGMENT_FRAMES) -> Drift:
    """Measure a video as it streams by; two frames are held at a time, and seven numbers for each.

    Args:
        images: uint8 [H, W, 3] each, in order.
        segment_frames: frames in the first and in the last segment, at least 2; the two may not overlap.

    Raises:
        ValueError: `segment_frames` below 2, fewer than two segments of frames, or frames under 3 pixels.
    """
    check_segment_frames(segment_frames)
    rows: list[list[float]] = []
    first_frame: Frames | None = None
    sampled: Array | None = None
    image: Frames
    for image in images:
        if first_frame is None:
            first_frame = image
        previous, sampled = sampled, _sample(image)
        rows.append(_measure(image, sampled, previous))
    if first_frame is None or len(rows) < 2 * segment_frames:
        raise ValueError(
            f"segment_frames is {segment_frames}, and the video must hold two segments; it holds {len(rows)} frames"
        )
    return Drift(np.array(rows), segment_frames, first_frame, image)


def check_segment_frames(segment_frames: int) -> None:
    """Refuse segments under two frames, which have no motion."""
    if segment_frames < 2:
        raise ValueError(f"segment_frames must be at least 2, got {segment_frames}")


def _sample(image: Frames) -> Array:
    """Every n-th pixel both ways, scaled to 0..1, with n such that about 120 rows are left (columns, if fewer).

    Sampled rather than averaged, so that noise at the scale of a pixel still counts; one lattice for every resolution,
    so that the Laplacian answers to structures of the same relative size.
    """
    height, width = image.shape[:2]
    if min(height, width) < 3:
        raise ValueError(f"frames must be at least 3 x 3 pixels, got {height} x {width}")
    step = max(1, round(min(height, width) / _LATTICE_ROWS))
    return image[::step, ::step].astype(np.float32) / 255


def _measure(image: Frames, sampled: Array, previous: Array | None) -> list[float]:
    gray = sampled.mean(axis=-1)
    highest, lowest = sampled.max(axis=-1), sampled.min(axis=-1)
    # Black has no saturation; the divisor is a 255th at least, as any other colour's highest channel is.
    saturation = (highest - lowest) / np.maximum(highest, 1 / 255)
    red, green, blue = sampled[..., 0], sampled[..., 1], sampled[..., 2]
    # One plane at a time: a mean over an axis of three costs twice as much as all the rest.
    full = (image[..., 0].astype(np.float32) + image[..., 1] + image[..., 2]) / (3 * 255)
    values = {
        "sharpness": _mean_laplacian(gray),
        "saturation": saturation.mean(),
        "contrast": gray.std(),
        "mean": gray.mean(),
        "high_frequency": np.abs(full[1:-1, 1:-1] - _binomial_blur(full)).mean(),
        "color_detail": (_mean_laplacian(red - green) + _mean_laplacian(blue - green)) / 2,
        "motion": np.abs(sampled - previous).mean() if previous is not None else np.nan,
    }
    return [float(values[name]) for name in METRICS]


def _mean_laplacian(plane: Array) -> float:
    center = plane[1:-1, 1:-1]
    around = plane[:-2, 1:-1] + plane[2:, 1:-1] + plane[1:-1, :-2] + plane[1:-1, 2:]
    return float(np.abs(4 * center - around).mean())


def _binomial_blur(plane: Array) -> Array:
    """The inner part of `plane`, [H, W] -> [H - 2, W - 2], under (1, 2, 1) / 4 in both directions."""
    across = (plane[:, :-2] + 2 * plane[:, 1:-1] + plane[:, 2:]) / 4
    return (across[:-2] + 2 * across[1:-1] + across[2:]) / 4
