"""What is kept of a video as it streams by, in memory that has a bound: pictures of its course and of its two ends."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from longlive_rag.generation.video import Frames, VideoWriter

T = TypeVar("T")

_ENDS_ROWS = 240
_GAP_COLUMNS = 8
_LEAST_SIZE = 16


class Thinned(Generic[T]):
    """Evenly spaced items of a stream of unknown length: every n-th, with n doubled whenever there are too many.

    Args:
        limit: the most items that are kept, even.

    Attributes:
        items: those kept; item i came as number `i * stride` of the stream.
        stride: n.
    """

    def __init__(self, limit: int) -> None:
        self.items: list[T] = []
        self.stride = 1
        self._limit, self._seen = limit, 0

    def wants(self) -> bool:
        """Whether the next item will be kept, and is worth preparing."""
        return self._seen % self.stride == 0

    def add(self, item: T | None) -> None:
        """Take the next item of the stream; None where it is not wanted."""
        if self.wants():
            assert item is not None
            self.items.append(item)
            if len(self.items) > self._limit:
                self.items = self.items[::2]
                self.stride *= 2
        self._seen += 1


def shrunk(image: Frames, height: int) -> Frames:
    """`image` uint8 [H, W, 3] at a whole fraction of its size, about `height` rows: means of the pixels merged."""
    factor = max(1, round(image.shape[0] / height))
    if factor == 1:
        return image
    rows, columns = image.shape[0] // factor, image.shape[1] // factor
    cut = image[: rows * factor, : columns * factor]
    # Added row by row and column by column: a mean over two axes of a 5-D view takes ten times as long.
    total = np.zeros((rows, columns, 3), np.uint32)
    for down in range(factor):
        for across in range(factor):
            total += cut[down::factor, across::factor]
    means: Frames = ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)
    return means


@dataclass
class Ends:
    """The first and the last frames of a video, made small.

    Attributes:
        length: frames of each end.
        first, last: uint8 [h, w, 3] each.
    """

    length: int
    first: list[Frames]
    last: deque[Frames]

    @classmethod
    def of_length(cls, length: int) -> Ends:
        return cls(length, [], deque(maxlen=length))

    def add(self, image: Frames) -> None:
        small = shrunk(image, _ENDS_ROWS)
        if len(self.first) < self.length:
            self.first.append(small)
        self.last.append(small)

    def limit(self, length: int) -> None:
        """Keep no more than so many frames of each end, as where the two would overlap."""
        self.length = min(self.length, length)
        self.first = self.first[: self.length]
        self.last = deque(self.last, maxlen=self.length)

    def forget(self) -> None:
        """Free the frames, when they have been written."""
        self.first.clear()
        self.last.clear()

    def write(self, path: Path, fps: float) -> None:
        """Write a video of both, the first frames to the left of the last ones, atomically.

        Raises:
            OSError: as `VideoWriter`.
        """
        # No codec takes odd or tiny sizes.
        enlarged = -(-_LEAST_SIZE // min(self.first[0].shape[:2]))
        height, width = (enlarged * size // 2 * 2 for size in self.first[0].shape[:2])
        gap = np.full((height, _GAP_COLUMNS, 3), 255, np.uint8)
        with VideoWriter(path, fps=fps) as writer:
            for left, right in zip(self.first, self.last, strict=True):
                halves = [each.repeat(enlarged, 0).repeat(enlarged, 1)[:height, :width] for each in (left, right)]
                writer.write(np.concatenate([halves[0], gap, halves[1]], axis=1)[None])
