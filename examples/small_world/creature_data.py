"""Training batches of the drift track: creatures without a codebook, on cuts."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from longlive_rag.small_world import creatures, world
from longlive_rag.small_world.codec import LATENT_CHANNELS, Codec, to_signal
from training_data import CELL, CHUNK, COUPLED_ABOVE, NOISY, Batch, draw_contexts, noise_levels, shifted

SPOTS_PER_PLACE = len(world.SPOTS) // world.PLACES
STRANGER_WEIGHT = 0.5  # a stranger's attributes can be read from the noise above COUPLED_ABOVE only


class CreatureWorld:
    """The world in latents. Exact, since the encoder sees single patches."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        screens = np.split(world.landscape(), world.PLACES, axis=1)
        self.scene = codec.encode(np.stack(screens))  # [places, 16, 8, 8]
        self.spots = np.arange(len(world.SPOTS)).reshape(world.PLACES, SPOTS_PER_PLACE)
        corners = [(y // world.STRIDE, x % world.SIZE // world.STRIDE) for x, y in world.SPOTS]
        self.corners = [corners[i : i + SPOTS_PER_PLACE] for i in range(0, len(corners), SPOTS_PER_PLACE)]
        draws = torch.randn(
            LATENT_CHANNELS * CELL * CELL, creatures.DIRECTIONS, generator=torch.Generator().manual_seed(0)
        )
        self.directions = torch.linalg.qr(draws)[0].T.contiguous()  # [DIRECTIONS, 64], orthonormal

    def cells(self, places: np.ndarray, phases: np.ndarray, pictures: np.ndarray) -> Tensor:
        """Latents [N, spots of a place, 16, 2, 2] of places, phases [N], pictures [N, spots of a place, 12, 12, 4]."""
        each = pictures.reshape(-1, *pictures.shape[2:])
        spots = self.spots[places]
        painted = creatures.cells(spots.ravel(), phases.repeat(SPOTS_PER_PLACE), each)
        with torch.no_grad():
            return self.codec.encoder(to_signal(painted)).unflatten(0, spots.shape)

    def frames(self, places: np.ndarray, cells: Tensor, canvas: Tensor | None = None) -> Tensor:
        """Latent frames [N, 16, 8, 8] with cells [N, spots of a place, 16, 2, 2] on a canvas, default the landscape."""
        canvas = (self.scene[places] if canvas is None else canvas).clone()
        for place in range(world.PLACES):
            chosen = torch.from_numpy(np.flatnonzero(places == place))
            for spot, (row, column) in enumerate(self.corners[place]):
                canvas[chosen, :, row : row + CELL, column : column + CELL] = cells[chosen, spot]
        return canvas

    def couple(self, noise: Tensor, cast: np.ndarray) -> Tensor:
        """Cell noise [N, spots, 16, 2, 2] whose components along the directions say who stands there.

        cast: [N, spots, attributes], uniform. A linear attribute is the normal quantile of a component; a circular one
        is the angle of two, whose radius stays. Over uniform casts the noise stays exactly Gaussian, and who a
        newcomer is follows from the noise.
        """
        flat = noise.flatten(2)
        now = flat @ self.directions.T
        linear = int((~creatures.CIRCULAR).sum())
        who = torch.from_numpy(cast.astype(np.float32))
        wanted = now.clone()
        quantile = who[..., ~creatures.CIRCULAR].clamp(1e-5, 1 - 1e-5)
        wanted[..., :linear] = math.sqrt(2) * torch.erfinv(2 * quantile - 1)
        circles = wanted[..., linear:].unflatten(-1, (-1, 2))
        angle = 2 * math.pi * who[..., creatures.CIRCULAR]
        circles = circles.norm(dim=-1, keepdim=True) * torch.stack([angle.cos(), angle.sin()], dim=-1)
        wanted[..., linear:] = circles.flatten(-2)
        return (flat + (wanted - now) @ self.directions).view(noise.shape)


def draw_cuts(generator: np.random.Generator, chunks: int) -> np.ndarray:
    """Places [chunks, CHUNK]; in a third of the frames the camera jumps to another."""
    places = np.empty((chunks, CHUNK), np.int64)
    for walk in places:
        here = int(generator.integers(world.PLACES))
        for frame in range(CHUNK):
            if generator.random() < 1 / 3:
                here = (here + int(generator.integers(1, world.PLACES))) % world.PLACES
            walk[frame] = here
    return places


def draw_batch(latent_world: CreatureWorld, generator: np.random.Generator, chunks: int) -> Batch:
    """A batch, as `training_data.draw_batch`."""
    walks = draw_cuts(generator, chunks)
    context, distance, used = draw_contexts(generator, walks * world.VIEWS_PER_PLACE)
    places = walks.ravel()
    video = np.repeat(np.arange(chunks), CHUNK)
    phases = (np.tile(np.arange(CHUNK), chunks) + generator.integers(0, world.PHASES, chunks)[video]) % world.PHASES
    worlds = creatures.draw_creatures(generator, 2 * chunks).reshape(2 * chunks, world.PLACES, SPOTS_PER_PLACE, -1)
    pictures = creatures.paint(worlds.reshape(-1, worlds.shape[-1]))
    pictures = pictures.reshape(*worlds.shape[:-1], *pictures.shape[1:])
    cells = latent_world.cells(places, phases, pictures[video, places])
    others = latent_world.cells(places, phases, pictures[chunks + video, places])
    target = latent_world.frames(places, cells)

    seen = torch.from_numpy(walks)[torch.arange(chunks)[:, None, None], context] == torch.from_numpy(walks)[..., None]
    known = (seen & used).any(dim=2).flatten()  # [N]: the context shows this place

    def blended(probability: float, most: Tensor | float) -> Tensor:
        """Cells in which some creatures are mixed with up to `most` of another."""
        share = torch.rand(cells.shape[:2]) * most * (torch.rand(cells.shape[:2]) < probability)
        return torch.lerp(cells, others, share[..., None, None, None])

    # In a roll-out the context is the model's own work: a little noisy, a little blended.
    clean = latent_world.frames(places, blended(0.3, 0.35))
    clean = clean + torch.randn_like(clean) * (0.15 * torch.rand(len(clean), 1, 1, 1))
    inputs, levels = [clean], [torch.zeros(len(clean))]
    for _ in range(NOISY):
        level = noise_levels()[
            torch.multinomial(torch.tensor([0.25, 0.2, 0.2, 0.2, 0.15]), len(clean), replacement=True)
        ]
        level = torch.where(torch.rand(len(clean)) < 0.15, shifted(torch.rand(len(clean)) * 0.98 + 0.01), level)
        coupled = ~known & (level > COUPLED_ABOVE)
        noise = torch.randn_like(cells)
        noise[coupled] = latent_world.couple(noise[coupled], worlds[video, places][coupled.numpy()])
        noise = latent_world.frames(places, noise, torch.randn_like(clean))
        # A draft made with the wrong memory shows wrong inhabitants: what the context knows must win over it.
        most = known[:, None] * torch.where(level > 0.5, 1.0, 0.4)[:, None]
        draft = latent_world.frames(places, blended(0.25, most))
        amount = level[:, None, None, None]
        inputs.append((1 - amount) * draft + amount * noise)
        levels.append(level)

    def by_chunk(streams: list[Tensor]) -> Tensor:
        return torch.stack([stream.unflatten(0, (chunks, CHUNK)) for stream in streams], dim=1)

    level = by_chunk(levels)
    on_spot = latent_world.frames(places, torch.ones_like(cells), torch.zeros_like(clean))
    trust = torch.where(known, 1.0, STRANGER_WEIGHT)[:, None, None, None]
    weight = (1.0 + 2.0 * on_spot * trust).unflatten(0, (chunks, 1, CHUNK)) / (level[:, 1:] + 0.1)[
        ..., None, None, None
    ]
    return Batch(
        latents=by_chunk(inputs).flatten(0, 2)[:, None],
        timestep=1000 * level.flatten()[:, None],
        views=torch.from_numpy(walks * world.VIEWS_PER_PLACE)
        .view(chunks, 1, CHUNK)
        .expand(-1, 1 + NOISY, -1)
        .flatten(),
        context=context,
        distance=distance,
        used=used,
        target=target.unflatten(0, (chunks, 1, CHUNK)).expand(weight.shape),
        weight=weight,
    )
