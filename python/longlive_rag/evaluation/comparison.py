"""Which of two videos has drifted further, and how sure that is."""

from __future__ import annotations

from typing import NamedTuple

from longlive_rag.evaluation.drift import METRICS, Drift
from longlive_rag.intervals import bootstrap_interval

# A bootstrap of fewer values is an interval in name only: of four it holds the truth 3 times in 4 at best.
FEWEST_SEGMENTS = 5
NOTICEABLE = 0.0005
"""A difference below this, a twentieth of a per cent of the beginning, is none: it would be printed as 0.0."""


class Difference(NamedTuple):
    """How much further one video moves from its beginning than another, in one metric; 0.2 for 20% of that beginning.

    Attributes:
        mean: over the segments after the first.
        low, high: 95% interval by resampling those segments; None if there are fewer than `FEWEST_SEGMENTS`.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def decided(self) -> bool:
        """Whether the interval is on one side of 0, and the difference worth naming."""
        one_sided = self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)
        return one_sided and abs(self.mean) >= NOTICEABLE


def compare(video: Drift, other: Drift) -> dict[str, Difference | None]:
    """Compare two videos, segment by segment: each metric's |m_i / m_1 - 1| in `video` less that in `other`.

    The segments of one time are a pair, and if one video is longer the rest of it is left out. The interval is about
    this pair of videos, not about other seeds or prompts, and it takes the segments for independent draws. Of eight
    that are, it holds the truth 88 times in 100; if each resembles the one before (a correlation of 0.8, as in slow
    drift), 39 times.

    Returns:
        For each metric a difference, positive if `video` has moved further; None where a first segment has nothing to
        compare with.
    """
    segments = min(len(video.segments), len(other.segments))
    differences = abs(video.deviations[: segments - 1]) - abs(other.deviations[: segments - 1])
    ends = bootstrap_interval(differences) if segments - 1 >= FEWEST_SEGMENTS else None
    found: dict[str, Difference | None] = {}
    for index, (name, mean) in enumerate(zip(METRICS, differences.mean(axis=0).tolist(), strict=True)):
        if mean != mean:
            found[name] = None
        elif ends is None:
            found[name] = Difference(mean, None, None)
        else:
            found[name] = Difference(mean, float(ends[0][index]), float(ends[1][index]))
    return found
