"""What several tracks say of their cells in the same way: intervals over trainings and videos, pairs of policies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from longlive_rag.intervals import crossed_interval
from longlive_rag.small_world.report import Setting
from longlive_rag.small_world.tracks.track import Cell, Track, Values


def interval(values: np.ndarray, digits: int = 4) -> dict[str, float]:
    """Mean of [trainings, videos] with its 95% interval over both."""
    low, high = crossed_interval(values)
    numbers = {"mean": values.mean(), "low": low, "high": high}
    return {name: round(float(value), digits) for name, value in numbers.items()}


def rounded(values: np.ndarray, digits: int = 4) -> list[float]:
    return [round(float(value), digits) for value in values]


def paired(
    track: Track, cells: Mapping[str, Values], setting: Setting, first: str, second: str
) -> list[tuple[Values, Values]]:
    """What two policies found on the same videos, of each training that both have; `cells` by `Cell.key`."""
    found = [
        [cells.get(Cell(track.name, policy, setting, training).key) for policy in (first, second)]
        for training in range(track.trainings)
    ]
    return [(one, other) for one, other in found if one is not None and other is not None]
