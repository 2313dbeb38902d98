"""Inhabitants without a codebook: creatures with eight continuous attributes, and a reader of these from the pixels.

An attribute is a number in [0, 1), uniform over creatures. Three of them are circular: hue 0.99 is next to
hue 0. No creature appears twice, so that what a video shows of one can only have been copied from its own frames.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from longlive_rag.small_world import world
from longlive_rag.small_world.backbone import ASSETS, load_weights

ATTRIBUTES = (
    "hue",
    "stripe hue",
    "lightness",
    "size",
    "ear length",
    "stripe frequency",
    "stripe phase",
    "eye distance",
)
CIRCULAR = np.array([True, True, False, False, False, False, True, False])
DIRECTIONS = len(ATTRIBUTES) + int(CIRCULAR.sum())  # a circle takes two coordinates
FINE = 4  # pixels are painted FINE x FINE times finer and averaged
SATURATION = 0.85
INK, WHITE = np.array([38.0, 28, 58]), np.array([255.0, 255, 255])


def draw_creatures(generator: np.random.Generator, videos: int) -> np.ndarray:
    """Inhabitants of `videos` worlds: [videos, spots, attributes], uniform in [0, 1)."""
    return generator.random((videos, len(world.SPOTS), len(ATTRIBUTES)))


def attribute_error(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Distance of each attribute, [..., attributes]; on a circle the shorter way round.

    Chance, for independent creatures, is 1/4 for a circular attribute and 1/3 for another.
    """
    apart = np.abs(found - true)
    return np.where(CIRCULAR, np.minimum(apart % 1, 1 - apart % 1), apart)


def colours(hue: np.ndarray, value: np.ndarray) -> np.ndarray:
    """RGB 0 .. 255 [N, 3] of hues and brightnesses [N]."""
    place = (np.array([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    return 255 * value[:, None] * (1 - SATURATION * np.clip(np.minimum(place, 4 - place), 0, 1))


def paint(creatures: np.ndarray) -> np.ndarray:
    """Creatures [N, attributes] to pictures [N, SPRITE, SPRITE, 4]: colour 0 .. 255, coverage 0 .. 1, antialiased."""
    side = world.SPRITE * FINE
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    x, y = (axis[None] for axis in np.meshgrid(grid, grid))  # y points down
    hue, stripe_hue, lightness, size, ear, frequency, phase, eye = creatures.astype(np.float32).T[:, :, None, None]
    radius = 0.56 + 0.3 * size
    value = 0.6 + 0.38 * lightness[:, 0, 0]
    body_colour = colours(hue[:, 0, 0], value)[:, None, None]
    stripe_colour = colours(stripe_hue[:, 0, 0], 0.6 * value)[:, None, None]

    inside = np.hypot(x, (y - 0.22) * 1.12)
    tip = 0.22 - 0.75 * radius - 0.12 - 0.5 * ear  # of the ears, above the body
    ears = (np.abs(np.abs(x) - 0.55 * radius) < 0.36 * (y - tip)) & (np.abs(np.abs(x) - 0.55 * radius) < 0.24)
    ears = ears & (y < 0.1)
    outline = (inside < radius) | ears
    body = (inside < radius - 0.08) | (
        (np.abs(np.abs(x) - 0.55 * radius) < 0.36 * (y - tip - 0.22)) & ears & (inside >= radius - 0.08)
    )
    stripes = (0.5 + 0.5 * np.sin(2 * np.pi * ((0.45 + 0.65 * frequency) * x + phase)))[..., None]
    shade = (0.95 - 0.2 * y)[..., None]
    picture = np.empty((len(creatures), side, side, 4), np.float32)
    picture[..., :3] = np.clip((body_colour + (stripe_colour - body_colour) * stripes) * shade, 0, 255)
    picture[..., :3] = np.where(body[..., None], picture[..., :3], INK)
    apart = np.abs(np.abs(x) - (0.14 + 0.28 * eye))
    picture[..., :3] = np.where((np.hypot(apart, y - 0.1) < 0.2)[..., None], WHITE, picture[..., :3])
    picture[..., :3] = np.where((np.hypot(apart, y - 0.12) < 0.11)[..., None], INK, picture[..., :3])
    picture[..., 3] = outline
    fine = picture.reshape(len(creatures), world.SPRITE, FINE, world.SPRITE, FINE, 4)
    coverage = fine[..., 3:].mean(axis=(2, 4))
    colour = (fine[..., :3] * fine[..., 3:]).mean(axis=(2, 4)) / np.maximum(coverage, 1e-6)
    return np.concatenate([colour, coverage], axis=-1)


@cache
def backgrounds() -> np.ndarray:
    """What is behind each inhabitant: [spots, CELL, CELL, 3] float32, 0 .. 255."""
    scene = world.landscape().astype(np.float32)
    return np.stack([scene[y : y + world.CELL, x : x + world.CELL] for x, y in world.SPOTS])


def cells(spots: np.ndarray, phases: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Cells [N, CELL, CELL, 3] uint8 of painted creatures [N, SPRITE, SPRITE, 4] on spots [N] at phases [N]."""
    cell = backgrounds()[spots]
    margin = (world.CELL - world.SPRITE) // 2
    shifts = np.array(world.MOTION)[phases] + margin
    for dx, dy in set(map(tuple, shifts.tolist())):
        chosen = (shifts == (dx, dy)).all(axis=1)
        area = np.s_[chosen, dy : dy + world.SPRITE, dx : dx + world.SPRITE]
        cell[area] += (pictures[chosen][..., :3] - cell[area]) * pictures[chosen][..., 3:]
    return np.clip(cell.round(), 0, 255).astype(np.uint8)


def render(views: np.ndarray, phases: np.ndarray, creatures: np.ndarray) -> np.ndarray:
    """Frames [N, SIZE, SIZE, 3] uint8 for camera positions [N] and phases [N] of the world `creatures` [spots, 8]."""
    pictures = paint(creatures)
    scene = world.landscape()
    frames = np.stack([scene[:, v * world.STRIDE : v * world.STRIDE + world.SIZE] for v in views])
    for spot, (x, y) in enumerate(world.SPOTS):
        cell = cells(
            np.full(len(views), spot), phases, np.broadcast_to(pictures[spot], (len(views), *pictures[0].shape))
        )
        for frame, view, picture in zip(frames, views, cell, strict=True):
            left = view * world.STRIDE
            start, stop = max(x, left), min(x + world.CELL, left + world.SIZE)
            if start < stop:
                frame[y : y + world.CELL, start - left : stop - left] = picture[:, start - x : stop - x]
    return frames


class Reader(nn.Module):
    """Reads the attributes of a creature from its cell and the background behind it.

    A network, since shape, colour and place overlap in twelve pixels; how well it reads is measured on true frames (the
    floor of every figure).
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(6, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 192),
            nn.SiLU(),
            nn.Linear(192, DIRECTIONS),
        )

    def forward(self, crops: Tensor, spots: Tensor) -> Tensor:
        """Crops [N, CELL, CELL, 3] float, 0 .. 255, on spots [N] to coordinates [N, DIRECTIONS] as of `coordinates`."""
        behind = torch.from_numpy(backgrounds())[spots]
        both = torch.cat([crops - 127.5, crops - behind], dim=-1) / 64
        return self.layers(both.permute(0, 3, 1, 2))

    @torch.no_grad()
    def read(self, crops: np.ndarray, spots: np.ndarray) -> np.ndarray:
        """Attributes [N, 8] of crops [N, CELL, CELL, 3] uint8 on spots [N]."""
        out = self(torch.from_numpy(crops).float(), torch.from_numpy(spots)).double().numpy()
        linear, circles = out[:, : int((~CIRCULAR).sum())], out[:, int((~CIRCULAR).sum()) :].reshape(len(out), -1, 2)
        found = np.empty((len(out), len(ATTRIBUTES)))
        found[:, ~CIRCULAR] = np.clip(linear, -0.5, 0.5) + 0.5
        found[:, CIRCULAR] = np.arctan2(circles[..., 1], circles[..., 0]) / (2 * np.pi) % 1
        return found


def coordinates(creatures: np.ndarray) -> np.ndarray:
    """What `Reader` is trained to give: [..., DIRECTIONS], the linear attributes around 0, then cosines and sines."""
    angle = 2 * np.pi * creatures[..., CIRCULAR]
    circles = np.stack([np.cos(angle), np.sin(angle)], axis=-1).reshape(*creatures.shape[:-1], -1)
    return np.concatenate([creatures[..., ~CIRCULAR] - 0.5, 0.5 * circles], axis=-1).astype(np.float32)


@cache
def load_reader() -> Reader:
    """The bundled reader; raises as `backbone.load_codec`."""
    reader = Reader()
    load_weights(reader, ASSETS / "drift_reader.safetensors")
    return reader.eval().requires_grad_(False)
