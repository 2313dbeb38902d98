"""Creatures without a codebook: what is painted can be read, and newcomers follow from exactly Gaussian noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from creature_data import CreatureWorld, draw_batch
from longlive_rag.small_world import creatures, world
from longlive_rag.small_world.backbone import ASSETS, load_codec
from longlive_rag.small_world.tracks import drift_report
from longlive_rag.small_world.tracks.drift import DRIFT, DWELL, LAP, LONG
from training_data import CHUNK, NOISY


@pytest.fixture(scope="module")
def latent_world() -> CreatureWorld:
    return CreatureWorld(load_codec(ASSETS / "drift_codec.safetensors"))


def test_a_circle_has_no_end():
    error = creatures.attribute_error(np.full(8, 0.98), np.full(8, 0.03))
    assert np.allclose(error[creatures.CIRCULAR], 0.05) and np.allclose(error[~creatures.CIRCULAR], 0.95)


def test_every_attribute_shows():
    plain = np.full((1, 8), 0.4)
    for attribute in range(8):
        other = plain.copy()
        other[0, attribute] = 0.6
        assert np.abs(creatures.paint(plain) - creatures.paint(other)).mean() > 0.1, creatures.ATTRIBUTES[attribute]


def test_coupled_noise_names_the_newcomer_and_stays_gaussian(latent_world):
    torch.manual_seed(0)
    cast = np.random.default_rng(0).random((4000, 3, 8))
    noise = latent_world.couple(torch.randn(4000, 3, 16, 2, 2), cast).flatten(2)
    along = (noise @ latent_world.directions.T).double().numpy()
    linear = int((~creatures.CIRCULAR).sum())
    uniform = torch.special.ndtr(torch.from_numpy(along[..., :linear])).numpy()
    assert np.allclose(uniform, cast[..., ~creatures.CIRCULAR], atol=1e-3)
    circles = along[..., linear:].reshape(4000, 3, -1, 2)
    angle = np.arctan2(circles[..., 1], circles[..., 0]) / (2 * np.pi) % 1
    apart = np.abs(angle - cast[..., creatures.CIRCULAR])
    assert np.minimum(apart, 1 - apart).max() < 1e-3
    flat = noise.flatten(0, 1)
    plain = torch.randn(flat.shape)
    deviation = [(x.T @ x / len(x) - torch.eye(64)).abs().max() for x in (flat, plain)]
    assert deviation[0] < 1.3 * deviation[1]


def test_composed_latents_equal_the_encoder_s(latent_world):
    generator = np.random.default_rng(0)
    places, phases = generator.integers(0, world.PLACES, 6), generator.integers(0, world.PHASES, 6)
    cast = creatures.draw_creatures(generator, 1)[0]
    pictures = creatures.paint(cast).reshape(world.PLACES, 3, world.SPRITE, world.SPRITE, 4)[places]
    composed = latent_world.frames(places, latent_world.cells(places, phases, pictures))
    frames = creatures.render(places * world.VIEWS_PER_PLACE, phases, cast)
    torch.testing.assert_close(composed, latent_world.codec.encode(frames), rtol=0, atol=1e-4)


def test_a_batch_keeps_its_promises(latent_world):
    torch.manual_seed(0)
    batch = draw_batch(latent_world, np.random.default_rng(0), chunks=2)
    assert batch.latents.shape == (2 * (1 + NOISY) * CHUNK, 1, 16, 8, 8)
    assert (batch.context < torch.arange(CHUNK)[:, None])[batch.used].all(), "a frame's context is its past"
    assert torch.isfinite(batch.latents).all() and (batch.weight > 0).all()


def rendered(laps: int, videos: int, slip: int = 0) -> tuple[world.Walk, np.ndarray, np.ndarray]:
    """True frames of DRIFT, whose clock slips by so many beats after the first lap."""
    walk, truth = DRIFT.walk(laps), DRIFT.draw(3, videos)
    late = np.arange(len(walk.views)) >= LAP
    seen = replace(walk, phases=(walk.phases + slip * late) % world.PHASES)
    return walk, truth, np.stack([DRIFT.render(seen, np.arange(len(walk.views)), each) for each in truth])


def test_true_pictures_err_less_than_strangers():
    walk, truth, frames = rendered(laps=2, videos=4)
    values = DRIFT.measure(walk, truth, True, frames).values
    assert values["error_of_attributes"].shape == (4, 2, 8) and values["error_of_attributes"].mean() < 0.1
    assert 0.2 < values["chance"].mean() < 0.35
    assert values["square_error"].max() == 0 and values["on_beat"].min() == 1


@pytest.mark.parametrize("slip", [1, 3, -1])
def test_a_clock_that_slips_is_no_change_of_the_creatures(slip):
    walk, truth, frames = rendered(laps=2, videos=2, slip=slip)
    values = DRIFT.measure(walk, truth, True, frames).values
    assert values["square_error"].max() == 0
    assert (values["on_beat"] == [1, 0]).all()


def test_the_last_visit_is_told_in_attributes_decibels_and_per_visit():
    """Three visits of two trainings: errors of .1, .2 and .3, the last picture 20 dB away."""
    errors = np.broadcast_to(np.array([0.1, 0.2, 0.3])[:, None], (2, 5, 3, 8))
    square = np.broadcast_to([0.0, 1e-3, 1e-2], (2, 5, 3))
    values = {
        "error_of_attributes": errors,
        "chance": np.full((2, 5, 8), 0.25),
        "square_error": square,
        "on_beat": np.ones((2, 5, 3)),
    }
    facts = drift_report.summary(values)
    for prefix in ("", "copied_"):
        assert facts[f"{prefix}error"] == {"mean": 0.3, "low": 0.3, "high": 0.3}
        assert facts[f"{prefix}excess"]["mean"] == 0.2 and facts[f"{prefix}slope"]["mean"] == 0.1
        assert facts[f"{prefix}chance"] == 0.25
    assert facts["psnr"]["mean"] == 20 and facts["psnr_by_visit"] == [30, 20]
    assert (facts["trainings"], facts["videos"]) == (2, 5)
    assert facts["error_of_attributes"]["hue"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("laps", [3, 5])
def test_the_picture_says_how_many_laps_were_measured(tmp_path, monkeypatch, laps):
    walk, truth, frames = rendered(laps, videos=2)
    outcome = DRIFT.measure(walk, truth, True, frames)
    stacked = {name: value[None] for name, value in outcome.values.items()}
    policies = {"retrieval": {"label": "draft", **DRIFT.summarise(walk, {"given": stacked})}}
    drawn = []
    monkeypatch.setattr(drift_report.figures, "save", lambda figure, path, dpi: drawn.append(figure))
    facts = {"laps": laps, "videos": 2, "policies": policies}
    DRIFT.draw_picture(tmp_path / "drift.png", facts, {}, {"retrieval/given/0": outcome.pictures})
    texts = [text.get_text() for text in drawn[0].findobj(Text)]
    assert any(f"{laps} laps, 2 videos" in text for text in texts)
    assert not any("welve" in text for text in texts)


def test_returns_show_the_first_beat_and_are_far_apart():
    walk = DRIFT.walk(3)
    assert (walk.views[LAP:] == walk.views[:-LAP]).all() and (walk.phases[LAP:] == walk.phases[:-LAP]).all()
    far = LONG.walk(3)
    for place in LONG.judged:
        seen = np.flatnonzero(far.views == place * world.VIEWS_PER_PLACE)
        gaps = np.diff(seen)[np.diff(seen) > 1]
        assert len(gaps) == 2 and gaps.min() > 1000
        assert far.phases[seen[0]] == far.phases[seen[DWELL]]
    assert len(far.views) > 2000
