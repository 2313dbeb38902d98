"""The world itself: who stands where can be read from its pixels, and walks return."""

import numpy as np
import pytest
import torch

from longlive_rag.small_world import world
from longlive_rag.small_world.backbone import load_codec
from longlive_rag.small_world.measure import AWAY, revisits
from longlive_rag.small_world.policies import CONTEXT, POLICIES


def random_scenes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    views = generator.integers(0, world.VIEWS, count)
    cast = world.draw_cast(generator, count)
    return world.render(views, generator.integers(0, world.PHASES, count), cast), views, cast


def test_inhabitants_decode_exactly_from_the_pixels():
    frames, views, cast = random_scenes(300, seed=1)
    sprites, errors = world.decode(frames, views)
    visible = sprites >= 0
    assert (sprites[visible] == cast[visible]).all()
    assert np.nanmax(errors) == 0
    for view, row in zip(views, visible, strict=True):
        assert tuple(np.flatnonzero(row)) == world.visible_spots(view)


def test_every_sprite_differs_from_every_other_on_every_spot():
    cells = world.sprite_cells().astype(np.float32) / 255
    for phase in range(world.PHASES):
        cell = cells[:, :, phase].reshape(len(world.SPOTS), world.SPRITES, -1)
        distance = np.sqrt(np.square(cell[:, :, None] - cell[:, None]).mean(axis=-1))
        assert distance[:, ~np.eye(world.SPRITES, dtype=bool)].min() > 0.06


def test_inhabitants_survive_the_codec_and_noise_on_its_latents():
    frames, views, cast = random_scenes(100, seed=2)
    codec = load_codec()
    latents = codec.encode(frames)
    noisy = latents + 0.3 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    sprites, _ = world.decode(codec.decode(noisy), views)
    visible = sprites >= 0
    assert (sprites[visible] == cast[visible]).all()
    error = np.square(codec.decode(latents).astype(np.float64) - frames).mean()
    assert 10 * np.log10(255**2 / error) > 30


def test_cuts_show_each_place_in_turn():
    walk = world.walk("cuts", 60)
    places = walk.views[:: world.DWELL] // world.VIEWS_PER_PLACE
    assert places.tolist() == [0, 1, 2, 3] * 3
    assert walk.lap == 20


def test_pans_glide_over_the_whole_world_and_back():
    walk = world.walk("pans", 2 * world.VIEWS)
    assert set(np.abs(np.diff(walk.views))) == {1}
    assert walk.views.min() == 0 and walk.views.max() == world.VIEWS - 1
    assert set(walk.views[: walk.lap]) == set(range(world.VIEWS))


@pytest.mark.parametrize("track", world.TRACKS)
def test_a_revisit_is_out_of_every_window(track):
    walk = world.walk(track, 121)
    events = revisits(walk)
    assert {event.spot for event in events} == set(range(len(world.SPOTS)))
    assert all(policy.config.context_frames == CONTEXT for policy in POLICIES.values())
    for event in events:
        assert event.spot in world.visible_spots(walk.views[event.frame])
        assert event.spot in world.visible_spots(walk.views[event.first_seen])
        assert event.frame >= walk.lap and event.first_seen < event.frame - AWAY
        away = walk.views[event.frame - AWAY : event.frame]
        assert not any(event.spot in world.visible_spots(view) for view in away)


def test_unknown_track():
    with pytest.raises(ValueError, match="track must be one of cuts, pans, got 'zooms'"):
        world.walk("zooms", 10)
