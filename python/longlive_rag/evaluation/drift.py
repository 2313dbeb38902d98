"""How far a video has drifted from its own beginning, measured on its pixels alone.

Every metric is a number per frame; drift is the relative change of its mean from the first segment of the video to
the last, and video drift error the weighted sum of its relative changes in all segments. No metric says by itself that
a video is bad: a scene that moves changes them all. They are for comparing videos of one prompt and seed, where
autoregressive drift shows as sharpness and colour detail that only grow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from longlive_rag.evaluation.self_similarity import SelfSimilarity, describe, self_similarity
from longlive_rag.evaluation.watched import Ends, Thinned, shrunk
from longlive_rag.generation.video import Frames

METRICS = {
    "sharpness": "mean absolute Laplacian of the grey image, at a 120th of its height",
    "saturation": "mean HSV saturation",
    "contrast": "standard deviation of the grey image",
    "mean": "mean over pixels and channels",
    "high_frequency": "mean absolute difference of the grey image from its 3 x 3 binomial blur, at full resolution",
    "color_detail": "mean absolute Laplacian of red - green and blue - green, at a 120th of the height",
    "motion": "mean absolute difference from the frame before",
    "unclipped": "share of pixels with no channel at black or white (below 2 or above 253 of 255)",
}
SEGMENT_FRAMES = 48
END_SECONDS = 5.0

# Below half a step of 8-bit video, averaged over a whole frame, a metric is rounding, and its relative change is noise.
_NOTHING = 0.5 / 255 / 100
_LATTICE_ROWS = 120
# A codec blurs what was clipped by a step or so.
_BLACK, _WHITE = 1.5 / 255, 253.5 / 255
_THUMBNAILS, _THUMBNAIL_ROWS = 32, 120
_DESCRIBED = 512

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Drift:
    """Metrics of one video over time.

    Attributes:
        values: float64 [frames, metrics] in the order of `METRICS`, pixels scaled to 0..1.
            The first frame has no motion (NaN).
        segment_frames: length of the first and last segment.
        fps: frames per second.
        thumbnails: pictures of its course, evenly spaced, and the second of each.
        ends: the first and the last five seconds (each half, if the video is shorter than ten).
        self_similarity: how alike its pictures are, by the time between them.
    """

    values: np.ndarray[Any, np.dtype[np.float64]]
    segment_frames: int
    fps: float
    thumbnails: list[tuple[float, Frames]]
    ends: Ends
    self_similarity: SelfSimilarity

    @property
    def first(self) -> dict[str, float]:
        """Mean of each metric over the first segment."""
        return _means(self.values[: self.segment_frames])

    @property
    def last(self) -> dict[str, float]:
        """Mean of each metric over the last segment."""
        return _means(self.values[-self.segment_frames :])

    @property
    def change(self) -> dict[str, float | None]:
        """Relative change of each metric, 0.41 for +41%; None where the first segment has nothing to compare with."""
        return _change(self.first, self.last)

    @property
    def end_change(self) -> dict[str, float | None]:
        """The same from the first five seconds to the last five."""
        return _change(_means(self.values[: self.ends.length]), _means(self.values[-self.ends.length :]))

    @property
    def segments(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Means [N, metrics] of N segments of equal length, about `segment_frames`, that cover the video."""
        parts = np.array_split(self.values, len(self.values) // self.segment_frames)
        return np.stack([np.nanmean(part, axis=0) for part in parts])

    @property
    def deviations(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """m_i / m_1 - 1 for the segments i = 2 to N, [N - 1, metrics]; NaN where there is nothing to compare with."""
        segments = self.segments
        beginning = np.where(segments[0] > _NOTHING, segments[0], np.nan)
        return segments[1:] / beginning - 1

    @property
    def video_drift_error(self) -> dict[str, float | None]:
        """Sum over the segments i = 2 to N of (N - i + 1) |m_i - m_1| / m_1, for each metric m; 0 without drift.

        None where the first segment has nothing to compare with. It grows with N squared: only videos with as many
        segments can be compared. From BlockVid (arXiv 2511.22973), with the linear weights of its published code.
        """
        deviations = abs(self.deviations)
        weights = np.arange(len(deviations), 0, -1)
        errors = (weights @ deviations).tolist()
        return {name: None if error != error else error for name, error in zip(METRICS, errors, strict=True)}


def _means(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    return dict(zip(METRICS, np.nanmean(values, axis=0).tolist(), strict=True))


def _change(first: dict[str, float], last: dict[str, float]) -> dict[str, float | None]:
    return {name: last[name] / first[name] - 1 if first[name] > _NOTHING else None for name in METRICS}


def measure_drift(images: Iterable[Frames], segment_frames: int = SEGMENT_FRAMES, *, fps: float = 16.0) -> Drift:
    """Measure a video as it streams by, in bounded memory but for eight numbers a frame.

    Args:
        images: uint8 [H, W, 3] each, in order.
        segment_frames: frames in the first and in the last segment, at least 2; the two may not overlap.
        fps: frames per second, for the times.

    Raises:
        ValueError: `segment_frames` below 2, `fps` not above 0, fewer than two segments, or frames under 3 pixels.
    """
    check_segment_frames(segment_frames)
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    rows: list[list[float]] = []
    thumbnails: Thinned[Frames] = Thinned(_THUMBNAILS)
    described: Thinned[Array] = Thinned(_DESCRIBED)
    ends = Ends.of_length(max(1, round(END_SECONDS * fps)))
    sampled: Array | None = None
    image: Frames
    for image in images:
        previous, sampled = sampled, _sample(image)
        rows.append(_measure(image, sampled, previous))
        thumbnails.add(shrunk(image, _THUMBNAIL_ROWS) if thumbnails.wants() else None)
        described.add(describe(sampled) if described.wants() else None)
        ends.add(image)
    if len(rows) < 2 * segment_frames:
        raise ValueError(
            f"segment_frames is {segment_frames}, and the video must hold two segments; it holds {len(rows)} frames"
        )
    ends.limit(len(rows) // 2)
    times = [index * thumbnails.stride / fps for index in range(len(thumbnails.items))]
    alike = self_similarity(
        np.stack(described.items), described.stride / fps, longest=(len(rows) - segment_frames) / fps
    )
    return Drift(np.array(rows), segment_frames, fps, list(zip(times, thumbnails.items, strict=True)), ends, alike)


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
    values: dict[str, Any] = {
        "sharpness": _mean_laplacian(gray),
        "saturation": saturation.mean(),
        "contrast": gray.std(),
        "mean": gray.mean(),
        "high_frequency": np.abs(full[1:-1, 1:-1] - _binomial_blur(full)).mean(),
        "color_detail": (_mean_laplacian(red - green) + _mean_laplacian(blue - green)) / 2,
        "motion": np.abs(sampled - previous).mean() if previous is not None else np.nan,
        "unclipped": ((lowest > _BLACK) & (highest < _WHITE)).mean(),
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
