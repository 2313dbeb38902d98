"""Self-similarity, validated on videos whose pictures turn by a known angle a frame."""

from __future__ import annotations

import numpy as np
import pytest

from longlive_rag.evaluation.drift import measure_drift
from longlive_rag.evaluation.self_similarity import describe, self_similarity


def turning_video(angles: np.ndarray) -> list[np.ndarray]:
    """Pictures whose mean-free parts correlate by the cosine of the difference of their angles."""
    across = np.cos(2 * np.pi * (np.arange(160) + 0.5) / 160)[None, :, None] * np.ones((90, 1, 3))
    down = np.cos(2 * np.pi * (np.arange(90) + 0.5) / 90)[:, None, None] * np.ones((1, 160, 3))
    # Averaged over the grid's cells, the two waves lose a little, and not the same.
    across, down = (wave / np.linalg.norm(describe(wave)) for wave in (across, down))
    scale = 60 / max(abs(across).max(), abs(down).max())
    pictures = [128 + scale * (np.cos(angle) * across + np.sin(angle) * down) for angle in angles]
    return list(np.round(pictures).astype(np.uint8))


def test_steady_change_falls_as_the_cosine_of_the_angle_turned():
    angle = np.pi / 2 / 60
    lags, means = measure_drift(turning_video(angle * np.arange(60)), segment_frames=10, fps=4).self_similarity
    assert lags[0] == 0.25 and lags[-1] == 12.5
    # A step of 8 bits is a hundredth of the waves.
    np.testing.assert_allclose(means, np.cos(angle * 4 * lags), atol=0.01)


def test_a_scene_that_comes_back_is_a_peak():
    angles = np.where(np.arange(60) // 10 % 2, np.pi / 2, 0)
    lags, means = measure_drift(turning_video(angles), segment_frames=10, fps=1).self_similarity
    alike = dict(zip(map(float, lags), map(float, means), strict=True))
    assert alike[20] == pytest.approx(1, abs=0.01) and alike[40] == pytest.approx(1, abs=0.01)
    assert alike[10] == pytest.approx(0, abs=0.01) and alike[30] == pytest.approx(0, abs=0.01)


def test_brightness_and_contrast_do_not_count():
    still = turning_video(np.zeros(30))
    brighter = [np.round(20 + 0.8 * image + index).astype(np.uint8) for index, image in enumerate(still)]
    _, means = measure_drift(brighter, segment_frames=5).self_similarity
    np.testing.assert_allclose(means, 1, atol=1e-3)


def test_pictures_of_one_colour_are_left_out():
    described = np.stack([np.full(12, 0.3), np.arange(12.0), np.arange(12.0)])
    lags, means = self_similarity(described, 1.0, longest=5.0)
    assert lags.tolist() == [1, 2]
    assert means[0] == pytest.approx(1) and np.isnan(means[1])


def test_a_long_video_keeps_a_bounded_number_of_pictures():
    still = turning_video(np.zeros(1))[0][::9, ::16]
    drift = measure_drift((still for _ in range(3000)), segment_frames=50, fps=10)
    assert len(drift.thumbnails) <= 33 and drift.thumbnails[0][0] == 0
    spaces = np.diff([seconds for seconds, _ in drift.thumbnails])
    np.testing.assert_allclose(spaces, spaces[0])
    assert drift.thumbnails[-1][0] > 250
    assert len(drift.self_similarity.lags) <= 60
    np.testing.assert_allclose(drift.self_similarity.means, 1)
