"""Drift metrics, validated on drift of known strength: the right axis moves, by the right amount."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longlive_rag.evaluation.drift import METRICS, measure_drift
from longlive_rag.generation.video import VideoReader, VideoWriter

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SEGMENT = 8
FRAMES = 24
PERIOD = 16


def textured_frame(offset: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """A float frame [120, 160, 3] around 0.45: waves of a known period that move, a little colour, fine noise."""
    wave = np.sin(2 * np.pi * (np.arange(160) + offset) / PERIOD)
    image = 0.45 + 0.12 * np.tile(wave, (120, 1))[..., None] + np.array([0.10, -0.02, -0.08])
    return image + rng.normal(0, noise, image.shape)


def drifting_video(change, strength: float, noise: float = 0.01) -> list[np.ndarray]:
    """Eight clean frames, eight under rising drift, eight under its full `strength`."""
    rng = np.random.default_rng(0)
    images = []
    for index in range(FRAMES):
        amount = strength * min(1.0, max(0.0, (index - SEGMENT + 1) / SEGMENT))
        frame = change(textured_frame(2 * index, noise, rng), amount, rng)
        images.append(np.round(255 * np.clip(frame, 0, 1)).astype(np.uint8))
    return images


def drift_of(change, strength: float, noise: float = 0.01) -> dict[str, float]:
    measured = {}
    for metric, value in measure_drift(drifting_video(change, strength, noise), segment_frames=SEGMENT).change.items():
        assert value is not None, metric
        measured[metric] = value
    return measured


def brighten(frame, amount, rng):
    return frame + amount


def stretch_contrast(frame, amount, rng):
    return 0.45 + (1 + amount) * (frame - 0.45)


def desaturate(frame, amount, rng):
    """Towards each pixel's own highest channel: HSV saturation falls by exactly `amount`."""
    highest = frame.max(axis=-1, keepdims=True)
    return highest - (1 - amount) * (highest - frame)


def blur(frame, amount, rng):
    """Gaussian of standard deviation `amount` pixels along the waves, by its transfer function."""
    frequency = np.fft.fftfreq(frame.shape[1])[None, :, None]
    transfer = np.exp(-2 * (np.pi * amount * frequency) ** 2)
    return np.fft.ifft(np.fft.fft(frame, axis=1) * transfer, axis=1).real


def add_noise(frame, amount, rng):
    return frame + rng.normal(0, amount, frame.shape) if amount else frame


def add_color_noise(frame, amount, rng):
    """Noise that leaves the grey image as it is."""
    if not amount:
        return frame
    noise = rng.normal(0, amount, frame.shape)
    return frame + noise - noise.mean(axis=-1, keepdims=True)


def test_video_without_drift_measures_none():
    drift = drift_of(brighten, 0.0)
    assert set(drift) == set(METRICS)
    # The frames' own noise differs; what is left is its sampling error.
    assert max(abs(value) for value in drift.values()) < 0.01


@pytest.mark.parametrize("strength", [-0.1, 0.05, 0.1, 0.2])
def test_brightness_is_measured_exactly_and_alone(strength):
    drift = drift_of(brighten, strength)
    assert drift["mean"] == pytest.approx(strength / 0.45, abs=0.005)
    for untouched in ("contrast", "sharpness", "high_frequency", "color_detail", "motion"):
        assert abs(drift[untouched]) < 0.01, untouched


@pytest.mark.parametrize("strength", [-0.5, -0.2, 0.25, 0.5])
def test_contrast_is_measured_exactly(strength):
    drift = drift_of(stretch_contrast, strength)
    assert abs(drift["mean"]) < 0.002
    for scaled in ("contrast", "sharpness", "high_frequency", "color_detail", "motion"):
        assert drift[scaled] == pytest.approx(strength, abs=0.02), scaled


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.6])
def test_saturation_is_measured_exactly(strength):
    assert drift_of(desaturate, strength)["saturation"] == pytest.approx(-strength, abs=0.01)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0])
def test_blur_lowers_sharpness_as_its_transfer_function(sigma):
    expected = np.exp(-2 * (np.pi * sigma / PERIOD) ** 2) - 1
    drift = drift_of(blur, sigma, noise=0.0)
    assert drift["contrast"] == pytest.approx(expected, abs=0.01)
    # The wave's Laplacian is a few steps of 8 bits high, and rounding is not blurred.
    assert drift["sharpness"] == pytest.approx(expected, abs=0.03)
    assert abs(drift["mean"]) < 0.002


def test_noise_raises_sharpness_and_detail_with_its_strength():
    drifts = [drift_of(add_noise, strength) for strength in (0.0, 0.02, 0.04, 0.08)]
    for metric in ("sharpness", "high_frequency", "color_detail"):
        values = [drift[metric] for drift in drifts]
        assert values == sorted(values) and values[1] > 0.05, metric
    # Far above the base noise, colour detail is noise alone and grows in proportion to it.
    assert (1 + drifts[3]["color_detail"]) / (1 + drifts[2]["color_detail"]) == pytest.approx(2, rel=0.03)


def test_color_noise_shows_in_color_detail_alone():
    drift = drift_of(add_color_noise, 0.05)
    assert drift["color_detail"] > 3
    assert abs(drift["sharpness"]) < 0.02 and abs(drift["high_frequency"]) < 0.05


@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("value", [-1.0, 2.0])
def test_clipped_pixels_are_what_is_missing_from_unclipped(share, value):
    def clip(frame, amount, rng):
        return np.where(rng.random((120, 160, 1)) < amount, value, frame)

    drift = drift_of(clip, share)
    assert drift["unclipped"] == pytest.approx(-share, abs=0.005)


STEP = 0.06


def stepping_video(change) -> list[np.ndarray]:
    """Four segments; the change grows by `STEP` from one to the next."""
    rng = np.random.default_rng(0)
    frames = [
        change(textured_frame(2 * index, 0.03, rng), STEP * (index // SEGMENT), rng) for index in range(4 * SEGMENT)
    ]
    return list(np.round(255 * np.clip(frames, 0, 1)).astype(np.uint8))


@pytest.mark.parametrize(
    ("change", "metrics", "deviation"),
    [
        (brighten, ["mean"], STEP / 0.45),
        (stretch_contrast, ["contrast", "sharpness", "high_frequency", "color_detail", "motion"], STEP),
        (desaturate, ["saturation"], STEP),
        (lambda frame, amount, rng: np.where(rng.random((120, 160, 1)) < amount, 2.0, frame), ["unclipped"], STEP),
    ],
)
def test_video_drift_error_weighs_each_segment(change, metrics, deviation):
    drift = measure_drift(stepping_video(change), segment_frames=SEGMENT)
    assert drift.segments.shape == (4, len(METRICS))
    for metric in metrics:
        # Weights 3, 2, 1 for deviations of 1, 2, 3 steps.
        assert drift.video_drift_error[metric] == pytest.approx(10 * deviation, rel=0.08), metric
    if change is stretch_contrast:
        mean = drift.video_drift_error["mean"]
        assert mean is not None and mean < 0.02


def test_video_drift_error_counts_early_drift_more_than_late():
    """The published weights fall: the same departure costs three times as much in the second segment as in the last."""
    frames = [np.full((32, 32, 3), 100, np.uint8)] * 16
    departed = [np.full((32, 32, 3), 130, np.uint8)] * 4
    early = measure_drift(frames[:4] + departed + frames[8:], segment_frames=4).video_drift_error["mean"]
    late = measure_drift(frames[:12] + departed, segment_frames=4).video_drift_error["mean"]
    assert (early, late) == (pytest.approx(0.9), pytest.approx(0.3))


def test_ends_are_five_seconds_or_half_of_a_short_video():
    ramp = [np.full((32, 32, 3), 20 + index, np.uint8) for index in range(120)]
    # Segments of a second; the ends are five, whose mean brightness is that of their middle frame.
    drift = measure_drift(ramp, segment_frames=8, fps=8)
    assert drift.ends.length == 40
    assert drift.end_change["mean"] == pytest.approx((20 + 99.5) / (20 + 19.5) - 1)
    assert measure_drift(ramp[:30], segment_frames=8, fps=8).ends.length == 15
    assert measure_drift(ramp[:30], segment_frames=8, fps=1).ends.length == 5


def test_frozen_video_loses_all_motion():
    moving = drifting_video(brighten, 0.0)
    drift = measure_drift(moving[:SEGMENT] + [moving[SEGMENT]] * (SEGMENT + 1), segment_frames=SEGMENT).change
    assert drift["motion"] == -1


def test_drift_has_no_ratio_to_nothing():
    gray = [np.full((32, 32, 3), 90, np.uint8)] * 8
    colored = [np.full((32, 32, 3), (90, 30, 30), np.uint8)] * 8
    drift = measure_drift(gray + colored, segment_frames=4).change
    assert drift["saturation"] is None and drift["sharpness"] is None
    assert drift["mean"] == pytest.approx(50 / 90 - 1, abs=1e-6)


def test_resolution_does_not_change_the_answer():
    images = drifting_video(stretch_contrast, 0.4)
    small = measure_drift(images, segment_frames=SEGMENT).change
    large = measure_drift([image.repeat(4, 0).repeat(4, 1) for image in images], segment_frames=SEGMENT).change
    for metric in ("sharpness", "saturation", "contrast", "mean", "color_detail", "motion"):
        assert large[metric] == pytest.approx(small[metric], abs=1e-6), metric


def test_video_file_measures_as_its_frames(tmp_path):
    # Without noise, which a codec takes out of the first frames more than out of the last.
    images = drifting_video(stretch_contrast, 0.4, noise=0.0)
    with VideoWriter(tmp_path / "video.mp4", fps=8) as writer:
        writer.write(np.stack(images))
    with VideoReader(tmp_path / "video.mp4") as video:
        coded = measure_drift(video, segment_frames=SEGMENT).change
    assert coded["contrast"] == pytest.approx(0.4, abs=0.02)
    assert coded["sharpness"] == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("frames", [0, 15])
def test_video_shorter_than_two_segments_is_refused(frames):
    with pytest.raises(ValueError, match=f"two segments; it holds {frames} frames"):
        measure_drift([np.zeros((32, 32, 3), np.uint8)] * frames, segment_frames=8)


def test_segment_of_one_frame_is_refused():
    with pytest.raises(ValueError, match="segment_frames must be at least 2"):
        measure_drift([np.zeros((32, 32, 3), np.uint8)] * 8, segment_frames=1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sliding_window_30s", {"sharpness": 0.41, "saturation": -0.12, "mean": 0.05}),
        ("retrieval_30s", {"sharpness": 0.19, "saturation": -0.11, "mean": 0.11}),
    ],
)
def test_published_pair_measures_as_known(name, expected):
    path = SHARED / f"{name}.mp4"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with VideoReader(path) as video:
        frames = video.frames
        assert frames is not None
        # The middle is decoded, but its metrics do not enter.
        ends = (image for index, image in enumerate(video) if index < 48 or index >= frames - 48)
        drift = measure_drift(ends).change
    for metric, value in expected.items():
        assert drift[metric] == pytest.approx(value, abs=0.006), metric
