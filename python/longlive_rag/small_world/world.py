"""The revisit world: a small world in which "did it stay itself?" has a right answer.

One landscape, four screens wide: a meadow, a seaside, a desert and a winter forest. A camera that sees one screen
either *cuts* between the four places or *pans* over them, in steps of 8 pixels. The landscape follows from the prompt;
the twelve inhabitants (each one of 16 sprites: 4 shapes times 4 colours) are drawn per video and appear nowhere but in
its frames. They circle on a common 8-phase beat. Which sprite stands on a spot is decoded from the pixels by the
nearest rendered sprite.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 64  # a frame is SIZE x SIZE pixels
PLACE_NAMES = ("meadow", "seaside", "desert", "winter forest")
PLACES = len(PLACE_NAMES)
WIDTH = PLACES * SIZE
STRIDE = 8  # pixels the camera moves in one frame of a pan; also the codec's patch
VIEWS = (WIDTH - SIZE) // STRIDE + 1  # camera positions, one prompt each
VIEWS_PER_PLACE = SIZE // STRIDE
SHAPES, COLOURS = ("slime", "star", "cat", "mushroom"), ("red", "gold", "blue", "violet")
SPRITES = len(SHAPES) * len(COLOURS)
SPRITE, CELL = 12, 16  # a sprite circles with radius 2 inside its cell
PHASES = 8
MOTION = tuple((round(2 * np.cos(np.pi * p / 4)), round(2 * np.sin(np.pi * p / 4))) for p in range(PHASES))
# Left upper corner of each inhabitant's cell in the landscape, multiples of CELL: three to a place.
SPOTS = (
    (0, 48),
    (32, 32),
    (48, 48),
    (64, 32),
    (80, 48),
    (112, 48),
    (128, 48),
    (160, 32),
    (176, 48),
    (192, 48),
    (208, 32),
    (240, 48),
)
DWELL = 5  # frames of one visit on the `cuts` track
TRACKS = ("cuts", "pans")


@dataclass(frozen=True)
class Walk:
    """Where the camera stands in each frame.

    views: [frames] camera position, 0 .. VIEWS - 1.  phases: [frames] beat of the inhabitants' motion.
    lap: frames of the first lap: after these, everything there is has been seen once.
    """

    track: str
    views: np.ndarray
    phases: np.ndarray
    lap: int


def lap_frames(track: str, laps: int) -> int:
    """Frames that a walk needs for `laps` times over the whole world."""
    return laps * DWELL * PLACES if track == "cuts" else 1 + laps * (VIEWS - 1)


def walk(track: str, frames: int) -> Walk:
    """A camera walk of `frames` frames on the track `cuts` or `pans`."""
    time = np.arange(frames)
    if track == "cuts":
        views, lap = (time // DWELL) % PLACES * VIEWS_PER_PLACE, DWELL * PLACES
    elif track == "pans":
        views, lap = VIEWS - 1 - np.abs(time % (2 * (VIEWS - 1)) - (VIEWS - 1)), VIEWS
    else:
        raise ValueError(f"track must be one of {', '.join(TRACKS)}, got {track!r}")
    return Walk(track, views, time % PHASES, lap)


def draw_cast(generator: np.random.Generator, videos: int) -> np.ndarray:
    """Inhabitants of `videos` worlds: [videos, len(SPOTS)] sprite numbers, uniform."""
    return generator.integers(0, SPRITES, (videos, len(SPOTS)))


@cache
def visible_spots(view: int) -> tuple[int, ...]:
    """Spots whose whole cell lies in the camera's view."""
    left = view * STRIDE
    return tuple(i for i, (x, _) in enumerate(SPOTS) if left <= x <= left + SIZE - CELL)


def render(views: np.ndarray, phases: np.ndarray, cast: np.ndarray) -> np.ndarray:
    """Frames [N, SIZE, SIZE, 3] uint8 for camera positions [N], phases [N] and casts [N, spots] or [spots]."""
    cast = np.broadcast_to(cast, (len(views), len(SPOTS)))
    scene, cells = landscape(), sprite_cells()
    frames = np.empty((len(views), SIZE, SIZE, 3), np.uint8)
    for frame, view, phase, sprites in zip(frames, views, phases, cast, strict=True):
        left = view * STRIDE
        frame[:] = scene[:, left : left + SIZE]
        for spot, (x, y) in enumerate(SPOTS):
            start, stop = max(x, left), min(x + CELL, left + SIZE)
            if start < stop:
                cell = cells[spot, sprites[spot], phase]
                frame[y : y + CELL, start - left : stop - left] = cell[:, start - x : stop - x]
    return frames


def decode(frames: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who stands where, by the nearest rendered sprite over all phases.

    frames: [N, SIZE, SIZE, 3] uint8; views: [N]. Returns (sprites [N, spots] int, -1 where the spot is not wholly in
    view; error [N, spots] float, root mean square distance to that rendered sprite on a scale of 0 to 1).
    """
    templates = sprite_cells().astype(np.float32).reshape(len(SPOTS), SPRITES * PHASES, -1) / 255
    sprites = np.full((len(frames), len(SPOTS)), -1)
    errors = np.full((len(frames), len(SPOTS)), np.nan, np.float32)
    for index, (frame, view) in enumerate(zip(frames, views, strict=True)):
        for spot in visible_spots(int(view)):
            x, y = SPOTS[spot][0] - view * STRIDE, SPOTS[spot][1]
            crop = frame[y : y + CELL, x : x + CELL].astype(np.float32).ravel() / 255
            distance = np.square(templates[spot] - crop).mean(axis=1)
            best = int(distance.argmin())
            sprites[index, spot], errors[index, spot] = best // PHASES, np.sqrt(distance[best])
    return sprites, errors


# ---- painting -------------------------------------------------------------------------------------------------------


@cache
def sprite_cells() -> np.ndarray:
    """Every inhabitant on every spot, before its background: [spots, SPRITES, PHASES, CELL, CELL, 3] uint8."""
    scene, sprites = landscape().astype(np.float32), paint_sprites()
    cells = np.empty((len(SPOTS), SPRITES, PHASES, CELL, CELL, 3), np.float32)
    margin = (CELL - SPRITE) // 2
    for spot, (x, y) in enumerate(SPOTS):
        cells[spot] = scene[y : y + CELL, x : x + CELL]
        for phase, (dx, dy) in enumerate(MOTION):
            window = cells[spot, :, phase, margin + dy :, margin + dx :][:, :SPRITE, :SPRITE]
            window += (sprites[..., :3] - window) * sprites[..., 3:]
    return np.clip(cells.round(), 0, 255).astype(np.uint8)


@cache
def paint_sprites() -> np.ndarray:
    """The codebook: [SPRITES, SPRITE, SPRITE, 4], colour 0..255 and coverage 0..1, antialiased."""
    fine = 8
    grid = (np.arange(SPRITE * fine) + 0.5) / (SPRITE * fine) * 2 - 1
    x, y = np.meshgrid(grid, grid)  # y points down
    ink, white, cream = np.array([38, 28, 58.0]), np.array([255.0, 255, 255]), np.array([255, 240, 214.0])
    colours = np.array([[240, 62, 62], [255, 204, 38], [44, 130, 255], [196, 66, 230]], np.float64)
    book = []
    for shape in SHAPES:
        body = silhouette(shape, x, y)
        outline = silhouette(shape, x * 0.86, y * 0.86 + (0.02 if shape == "star" else 0.0))
        for colour in colours:
            image = np.zeros((*x.shape, 4))
            shade = np.clip(0.95 - 0.28 * y, 0.7, 1.25)[..., None]
            image[outline] = [*ink, 1]
            image[body, :3] = np.clip(colour * shade, 0, 255)[body]
            eyes = 0.12 if shape != "mushroom" else 0.42
            if shape == "mushroom":
                image[body & (y > 0.12), :3] = cream
                for spot_x, spot_y in ((-0.45, -0.22), (0.35, -0.4)):
                    image[body & (np.hypot(x - spot_x, y - spot_y) < 0.17), :3] = cream
            for side in (-1, 1):
                eye = np.hypot(x - side * 0.3, (y - eyes) * 0.9)
                if shape != "mushroom":
                    image[eye < 0.24, :3] = white
                image[np.hypot(x - side * 0.27, y - eyes - 0.03) < 0.14, :3] = ink
            book.append(image)
    fine_book = np.stack(book).reshape(SPRITES, SPRITE, fine, SPRITE, fine, 4)
    coverage = fine_book[..., 3:].mean(axis=(2, 4))
    colour = (fine_book[..., :3] * fine_book[..., 3:]).mean(axis=(2, 4)) / np.maximum(coverage, 1e-6)
    return np.concatenate([colour, coverage], axis=-1).astype(np.float32)


def silhouette(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Inside of a shape on the square -1..1, y down."""
    if shape == "slime":
        dome = (np.abs(x) / 0.84) ** 2.4 + (np.abs(y - 0.3) / 0.9) ** 2.4 < 1
        return dome & (y < 0.74 + 0.08 * np.cos(9 * x))
    if shape == "star":
        angle, radius = np.arctan2(x, -y), np.hypot(x, y - 0.04)
        return radius < 0.6 + 0.3 * np.cos(5 * angle)
    if shape == "cat":
        face = (x / 0.8) ** 2 + ((y - 0.22) / 0.62) ** 2 < 1
        ears = (np.abs(np.abs(x) - 0.5) < 0.3 * (y + 0.86) / 0.7) & (y > -0.86) & (y < 0.2)
        return face | ears
    cap = (x / 0.86) ** 2 + ((y - 0.1) / 0.9) ** 2 < 1
    stem = (np.abs(x) < 0.46) & (y < 0.8)
    return (cap & (y < 0.12)) | (stem & (y > 0))


@cache
def landscape() -> np.ndarray:
    """The whole scene without its inhabitants: [SIZE, WIDTH, 3] uint8."""
    fine = 4
    x, y = np.meshgrid((np.arange(WIDTH * fine) + 0.5) / fine, (np.arange(SIZE * fine) + 0.5) / fine)
    top = across(x, [(86, 160, 235), (64, 170, 230), (244, 150, 110), (70, 88, 150)])
    low = across(x, [(205, 235, 250), (214, 244, 246), (255, 222, 160), (206, 190, 226)])
    image = top + (low - top) * smooth(y / 40)[..., None]
    glow(image, x, y, (52, 10), 5.5, (255, 246, 190))  # the sun of the meadow
    glow(image, x, y, (150, 15), 7.5, (255, 244, 214))  # the low sun of the desert
    glow(image, x, y, (234, 11), 4.5, (250, 250, 255))  # the moon of the forest
    for star_x, star_y in ((198, 6), (208, 14), (216, 4), (224, 20), (246, 5), (251, 17), (204, 22)):
        blend(image, np.hypot(x - star_x, y - star_y) < 0.75, (255, 255, 240), 0.9)
    for cloud_x, cloud_y, scale in ((14, 12, 1.0), (32, 20, 0.7), (80, 9, 0.9), (122, 20, 0.7), (178, 12, 0.6)):
        puffs = ((-6, 1, 3.2), (-1.5, -1.5, 4.4), (4, 0, 3.6), (8, 1.4, 2.4))
        inside = np.zeros(x.shape, bool)
        for px, py, radius in puffs:
            inside |= np.hypot(x - cloud_x - px * scale, (y - cloud_y - py * scale) * 1.25) < radius * scale
        blend(image, inside & (y < cloud_y + 2.6 * scale), (255, 255, 255), 0.85)
    far = 30 - 5 * np.sin(x / 13.0) - 3 * np.sin(x / 5.7 + 1) - 6 * place(x, 3) + 5 * place(x, 1)
    layer(image, y > far, across(x, [(126, 184, 150), (150, 200, 214), (226, 142, 100), (150, 152, 196)]), y - far, 14)
    peaks = far - 13 + 1.5 * np.abs((x - 4) % 22 - 11)
    blend(image, (y > peaks) & (y < far + 1) & (x > 186), (176, 178, 214), 1.0)
    blend(image, (y > peaks) & (y < peaks + 5 + np.sin(2 * x)) & (y < far + 1) & (x > 186), (244, 246, 255), 1.0)
    ground = 39 - 2.4 * np.sin(x / 17.0 + 0.6) - 1.2 * np.sin(x / 6.1) + 1.5 * place(x, 2)
    floor = across(x, [(112, 196, 84), (242, 216, 152), (238, 188, 112), (236, 242, 252)])
    layer(image, y > ground, floor, ground - y, 60)
    sea = (y > 33.5 + 0.4 * np.sin(x / 2.3)) & (y < 49 + 2.2 * np.sin(x / 9.0)) & (np.abs(x - 96) < 30 - (y - 33) * 0.5)
    layer(image, sea, np.broadcast_to(np.array([40.0, 150, 205]), image.shape), (33 - y), 34)
    foam = sea & (np.abs((y + 1.3 * np.sin(x / 3.1)) % 5 - 2.5) < 0.35)
    blend(image, foam, (214, 244, 250), 0.65)
    for tree_x, tree_y in ((24, 37), (9, 35.5), (58, 36)):
        blend(image, (np.abs(x - tree_x) < 0.9) & (y > tree_y - 4) & (y < tree_y + 4), (110, 74, 48), 1.0)
        for px, py, radius in ((0, -8, 5.0), (-3.2, -5, 3.6), (3.2, -5, 3.6)):
            crown = np.hypot(x - tree_x - px, y - tree_y - py) < radius
            blend(image, crown, (52, 140, 70), 1.0)
            blend(image, np.hypot(x - tree_x - px + 1.2, y - tree_y - py + 1.4) < radius * 0.55, (92, 180, 92), 0.8)
    trunk = np.abs(x - 106 - 3.5 * np.sin((y - 22) / 16)) < 1.1
    blend(image, trunk & (y > 23) & (y < 48), (142, 98, 62), 1.0)
    for angle in np.linspace(-2.9, -0.25, 6):
        along, across_leaf = turn(x - 105.5, y - 23, angle)
        leaf = (along > 0) & (along < 11) & (np.abs(across_leaf - along**2 * 0.03) < 1.7 - along * 0.13)
        blend(image, leaf, (46, 150, 84), 1.0)
    for cactus_x, cactus_y, tall in ((150, 44, 13), (182, 41, 9), (136, 40, 8)):
        body = capsule(x, y, cactus_x, cactus_y - tall, cactus_y, 1.7)
        arms = capsule(x, y, cactus_x - 4, cactus_y - tall * 0.75, cactus_y - tall * 0.45, 1.0)
        arms |= capsule(x, y, cactus_x + 4, cactus_y - tall * 0.9, cactus_y - tall * 0.55, 1.0)
        arms |= (np.abs(x - cactus_x) < 4) & (np.abs(y - cactus_y + tall * 0.5) < 0.9)
        blend(image, body | arms, (60, 140, 92), 1.0)
    for pine_x, pine_y in ((202, 41), (228, 40), (236, 43), (252, 40)):
        for step in range(3):
            tip = pine_y - 17 + 4.2 * step
            tier = (y > tip) & (y < tip + 6.5) & (np.abs(x - pine_x) < (y - tip) * (0.62 + 0.1 * step))
            blend(image, tier, (52, 100, 98), 1.0)
            blend(image, tier & (y < tip + 2.2), (244, 248, 255), 1.0)
        blend(image, (np.abs(x - pine_x) < 0.9) & (y > pine_y - 3) & (y < pine_y + 1), (92, 66, 60), 1.0)
    rng = np.random.default_rng(7)
    for flower_x, flower_y, tone in zip(
        rng.uniform(1, 62, 26), rng.uniform(44, 63, 26), rng.integers(0, 3, 26), strict=True
    ):
        blend(
            image,
            np.hypot(x - flower_x, y - flower_y) < 0.9,
            ((255, 250, 250), (255, 224, 90), (250, 150, 190))[tone],
            0.9,
        )
    for pebble_x, pebble_y in zip(rng.uniform(66, 190, 30), rng.uniform(50, 63, 30), strict=True):
        blend(image, np.hypot(x - pebble_x, (y - pebble_y) * 1.6) < 1.0, (214, 176, 122), 0.8)
    image = image.reshape(SIZE, fine, WIDTH, fine, 3).mean(axis=(1, 3))
    return np.clip(image.round(), 0, 255).astype(np.uint8)


def smooth(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def place(x: np.ndarray, index: int) -> np.ndarray:
    """Weight of a place at landscape column x; neighbours blend over 20 pixels."""
    left, right = x - index * SIZE, (index + 1) * SIZE - x
    weight = np.ones_like(x)
    if index > 0:
        weight = weight * smooth((left + 10) / 20)
    if index < PLACES - 1:
        weight = weight * smooth((right + 10) / 20)
    return weight


def across(x: np.ndarray, colours: list[tuple[int, int, int]]) -> np.ndarray:
    """One colour per place, blended from place to place."""
    weights = np.stack([place(x, index) for index in range(PLACES)], axis=-1)
    return weights @ np.array(colours, np.float64)


def blend(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], alpha: float) -> None:
    image[mask] += (np.array(colour, np.float64) - image[mask]) * alpha


def layer(image: np.ndarray, mask: np.ndarray, colour: np.ndarray, depth: np.ndarray, fade: float) -> None:
    """Fills a silhouette; it lightens with `depth` over `fade` pixels."""
    tint = np.clip(1 + 0.22 * np.clip(depth / fade, -1, 1), 0.7, 1.25)[..., None]
    image[mask] = np.clip(colour * tint, 0, 255)[mask]


def glow(
    image: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    centre: tuple[int, int],
    radius: float,
    colour: tuple[int, int, int],
) -> None:
    distance = np.hypot(x - centre[0], y - centre[1])
    halo = 0.55 * np.exp(-np.square(distance / (2.4 * radius)))[..., None]
    image += (np.array(colour, np.float64) - image) * halo
    blend(image, distance < radius, colour, 0.95)


def turn(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, -s * x + c * y


def capsule(x: np.ndarray, y: np.ndarray, centre: float, top: float, bottom: float, radius: float) -> np.ndarray:
    return np.hypot(x - centre, y - np.clip(y, top, bottom)) < radius
