"""The comparison of two videos: the difference injected is found, and the interval is as sure as it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from longlive_rag.evaluation.comparison import FEWEST_SEGMENTS, compare
from longlive_rag.evaluation.drift import METRICS, Drift, measure_drift
from longlive_rag.evaluation.drift_report import comparison_table, farthest

SEGMENT = 10
PICTURES = [np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)] * (2 * SEGMENT)


def drifting(strength: float, noise: float, rng: np.random.Generator, segments: int = 12) -> Drift:
    """Metrics that are at 1 in the first segment, and `strength` higher or lower in the others, with noise."""
    frames = np.arange(segments * SEGMENT)
    values = 1 + np.where(frames < SEGMENT, 0, strength)[:, None] + np.zeros((1, len(METRICS)))
    per_segment = rng.normal(0, noise, (segments, len(METRICS)))
    per_segment[0] = 0
    return replace(measure_drift(PICTURES, SEGMENT), values=values + per_segment.repeat(SEGMENT, axis=0))


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_difference_injected_is_found(sign):
    rng = np.random.default_rng(0)
    found = compare(drifting(sign * 0.3, 0.01, rng), drifting(0.1, 0.01, rng))
    for name, difference in found.items():
        assert difference is not None and difference.low is not None and difference.high is not None
        assert difference.mean == pytest.approx(0.2, abs=0.02), name
        assert difference.low < 0.2 + 0.01 and difference.high > 0.2 - 0.01
        assert difference.decided


def test_intervals_hold_the_truth_nearly_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = []
    for _ in range(60):
        for difference in compare(drifting(0.3, 0.05, rng), drifting(0.2, 0.05, rng)).values():
            assert difference is not None and difference.low is not None and difference.high is not None
            held.append(difference.low <= 0.1 <= difference.high)
    # 480 intervals of eleven segments each: a percentile bootstrap of so few holds 91 times in 100, not 95.
    assert 0.86 < np.mean(held) < 0.97


def test_few_segments_have_no_interval():
    rng = np.random.default_rng(2)
    for segments, has_one in ((FEWEST_SEGMENTS, False), (FEWEST_SEGMENTS + 1, True)):
        found = compare(drifting(0.3, 0.01, rng, segments), drifting(0.1, 0.01, rng, 12))
        for difference in found.values():
            assert difference is not None and (difference.low is not None) == has_one
            assert difference.decided == has_one


def test_nothing_to_compare_with_is_said_so():
    rng = np.random.default_rng(3)
    black, grey = drifting(0.1, 0.0, rng), drifting(0.1, 0.0, rng)
    black.values[:SEGMENT, list(METRICS).index("saturation")] = 0
    found = compare(black, grey)
    assert found["saturation"] is None
    assert found["mean"] is not None and found["mean"].mean == pytest.approx(0)
    assert "saturation      nothing to compare with" in comparison_table("a", "b", found)
    assert farthest({"black": black, "grey": grey}).endswith(f" of {len(METRICS) - 1} metrics")


def test_the_table_names_who_has_moved_further():
    rng = np.random.default_rng(4)
    table = comparison_table("far.mp4", "near.mp4", compare(drifting(0.4, 0.01, rng), drifting(0.1, 0.01, rng)))
    assert table.count("far.mp4") == len(METRICS) and "near.mp4" not in table
    nearly = comparison_table("a.mp4", "b.mp4", compare(drifting(0.2002, 0.0, rng), drifting(0.2, 0.0, rng)))
    assert nearly.count("undecided") == len(METRICS) and nearly.count("+0.0 (+0.0 to +0.0)") == len(METRICS)
    same = comparison_table("a.mp4", "b.mp4", compare(drifting(0.2, 0.0, rng), drifting(0.2, 0.0, rng)))
    assert same.count("undecided") == len(METRICS)


def test_the_sentence_counts_leads_that_can_be_noticed():
    rng = np.random.default_rng(5)
    near, far, farther = (drifting(strength, 0.0, rng) for strength in (0.1, -0.3, 0.3002))
    said = farthest({"near": near, "far": far, "third": drifting(0.2, 0.0, rng)})
    assert said == f"far is farthest from its beginning in {len(METRICS)} of {len(METRICS)} metrics"
    assert f"in 0 of {len(METRICS)} metrics" in farthest({"far": far, "farther": farther})
