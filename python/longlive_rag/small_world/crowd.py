"""Sixteen places that look alike in fours: the world of the track `crowd`.

Each of the four landscapes exists four times, with another host on its middle spot: the prompt says "the meadow of the
red slime" or "the meadow of the gold slime". The other two inhabitants of a place, its guests, follow from nothing but
the frames of that place. Places of one landscape are twins: their hosts differ in colour only, and their guests on the
same spot differ in one attribute, shape or colour.
"""

from __future__ import annotations

import numpy as np

from longlive_rag.small_world import world

TWINS = len(world.COLOURS)  # places of one landscape
PLACES = world.PLACES * TWINS
SPOTS_PER_PLACE = len(world.SPOTS) // world.PLACES
HOST, GUESTS = 1, (0, 2)  # spots of a place


def views(places: np.ndarray) -> np.ndarray:
    """Camera positions of places 0 .. PLACES - 1, any shape."""
    return places // TWINS * world.VIEWS_PER_PLACE


def draw_crowds(generator: np.random.Generator, videos: int) -> np.ndarray:
    """Inhabitants of `videos` worlds: sprite numbers [videos, PLACES, SPOTS_PER_PLACE], each uniform.

    The host of place p is sprite p: a shape for each landscape, a colour for each of its twins.
    """
    shape = (videos, world.PLACES, len(GUESTS))
    common = generator.integers(0, TWINS, shape)
    different = generator.permuted(np.broadcast_to(np.arange(TWINS), (*shape, TWINS)), axis=-1)
    common = np.broadcast_to(common[..., None], different.shape)
    same_shape = generator.random((*shape, 1)) < 0.5
    guests = np.where(same_shape, TWINS * common + different, TWINS * different + common)
    crowds = np.empty((videos, world.PLACES, TWINS, SPOTS_PER_PLACE), np.int64)
    crowds[..., GUESTS] = guests.swapaxes(-1, -2)
    crowds[..., HOST] = np.arange(PLACES).reshape(world.PLACES, TWINS)
    return crowds.reshape(videos, PLACES, SPOTS_PER_PLACE)


def cast(places: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """Casts of `world.render`, [N, len(world.SPOTS)], of places [N] with inhabitants [N, SPOTS_PER_PLACE]; spots of
    other landscapes hold sprite 0."""
    everyone = np.zeros((len(places), world.PLACES, SPOTS_PER_PLACE), np.int64)
    everyone[np.arange(len(places)), places // TWINS] = crowds
    return everyone.reshape(len(places), -1)


def render(places: np.ndarray, phases: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Frames [N, SIZE, SIZE, 3] uint8 of places [N] at phases [N] of one world [PLACES, SPOTS_PER_PLACE]."""
    return world.render(views(places), phases, cast(places, crowd[places]))


def decode(frames: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Who stands where in frames [N, SIZE, SIZE, 3] uint8 of places [N]: sprites [N, SPOTS_PER_PLACE]."""
    sprites, _ = world.decode(frames, views(places))
    return sprites.reshape(len(frames), world.PLACES, -1)[np.arange(len(frames)), places // TWINS]


def corners(places: np.ndarray) -> np.ndarray:
    """Left upper corners of the cells of places [N] on the screen: [N, SPOTS_PER_PLACE, 2], x and y."""
    spots = np.array(world.SPOTS).reshape(world.PLACES, SPOTS_PER_PLACE, 2)[places // TWINS]
    return spots % [world.SIZE, world.SIZE]
