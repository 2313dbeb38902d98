"""Creatures without a codebook: what is painted can be read, and newcomers follow from exactly Gaussian noise."""

import numpy as np
import pytest
import torch

from creature_data import CreatureWorld, draw_batch
from longlive_rag.small_world import creatures, world
from longlive_rag.small_world.backbone import ASSETS, load_codec
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


def test_true_pictures_err_less_than_strangers():
    walk, truth = DRIFT.walk(2), DRIFT.draw(3, 4)
    frames = np.stack([DRIFT.render(walk, np.arange(len(walk.views)), each) for each in truth])
    values = DRIFT.measure(walk, truth, True, frames).values
    assert values["error"].shape == (4, 2) and values["error"].max() < 0.15
    assert 0.2 < values["chance"].mean() < 0.35
    assert values["square_error"].max() == 0


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
