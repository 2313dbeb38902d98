"""Training batches of the small world: walks, contexts, noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longlive_rag.small_world import world
from longlive_rag.small_world.backbone import DENOISING_STEPS, TIMESTEP_SHIFT
from longlive_rag.small_world.codec import LATENT_CHANNELS, LATENT_SIZE, Codec
from longlive_rag.small_world.policies import CONTEXT, MEMORY

CHUNK = 16  # frames
NOISY = 2  # noisy streams to one clean stream
COLUMNS = CONTEXT - 1  # context entries of a frame, itself not counted
SINK_LOCAL = CONTEXT - 1 - 1  # past frames of the local window beside a sink
MEMORY_LOCAL = SINK_LOCAL - MEMORY  # past frames of the local window beside a sink and memory
COUPLED_ABOVE = 0.7  # noise level above which the noise decides who a stranger is
CELL = world.CELL // world.STRIDE  # latent positions of a sprite's cell, each way


class LatentWorld:
    """The world in latents, so that a batch is a gather. Exact, since the encoder sees single patches."""

    def __init__(self, codec: Codec) -> None:
        screens = np.split(world.landscape(), world.PLACES, axis=1)
        self.scene = torch.cat(list(codec.encode(np.stack(screens))), dim=-1)  # [16, 8, 32]
        cells = world.sprite_cells()
        self.cells = codec.encode(cells.reshape(-1, *cells.shape[3:])).unflatten(0, cells.shape[:3])
        self.corners = [(y // world.STRIDE, x // world.STRIDE) for x, y in world.SPOTS]
        columns = torch.tensor([column for _, column in self.corners])
        views = torch.arange(world.VIEWS)[:, None]
        self.shows = (columns > views - CELL) & (columns < views + LATENT_SIZE)  # [views, spots], any part of it
        self.codes = self._sprite_codes()

    def _sprite_codes(self) -> Tensor:
        """For each view and spot 16 orthonormal directions of a latent frame, one for each sprite.

        The orthonormal vectors nearest to what tells the sprites apart on the visible part of the cell (Löwdin), so
        that noise is as likely to be strongest along any of them. [views, spots, SPRITES, 16 * 8 * 8]; 0 out of view.
        """
        codes = torch.zeros(world.VIEWS, len(world.SPOTS), world.SPRITES, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        templates = self.cells.mean(dim=2)
        templates = templates - templates.mean(dim=1, keepdim=True)
        tie_break = 1e-6 * torch.randn(templates.shape, generator=torch.Generator().manual_seed(0))
        templates = templates + tie_break  # centred templates span 15 dimensions of 16
        for view, spot in self.shows.nonzero().tolist():
            row, column = self.corners[spot]
            left, right = max(column, view), min(column + CELL, view + LATENT_SIZE)
            part = templates[spot, :, :, :, left - column : right - column]
            u, _, vh = torch.linalg.svd(part.flatten(1).double(), full_matrices=False)
            code = (u @ vh).float().view(part.shape)
            codes[view, spot, :, :, row : row + CELL, left - view : right - view] = code
        return codes.flatten(3)

    def cell_latents(self, cast: Tensor, phases: Tensor) -> Tensor:
        """[N, spots, 16, 2, 2] for casts [N, spots] and phases [N]."""
        return self.cells[torch.arange(cast.shape[1]), cast, phases[:, None]]

    def frames(self, views: Tensor, cells: Tensor) -> Tensor:
        """Latent frames [N, 16, 8, 8] of camera positions [N] with cell latents [N, spots, 16, 2, 2]."""
        canvas = self.scene.expand(len(views), -1, -1, -1).clone()
        for spot, (row, column) in enumerate(self.corners):
            canvas[:, :, row : row + CELL, column : column + CELL] = cells[:, spot]
        columns = views[:, None] + torch.arange(LATENT_SIZE)
        return canvas.gather(3, columns[:, None, None].expand(-1, LATENT_CHANNELS, LATENT_SIZE, -1))

    def couple(self, noise: Tensor, views: Tensor, cast: Tensor, strangers: Tensor) -> Tensor:
        """Noise [N, 16, 8, 8] in which each stranger's own code is the strongest of the 16.

        A reflection swaps the two components in question; over uniform casts the noise stays exactly Gaussian. Who a
        new inhabitant is thus follows from the noise, and one step draws it crisp instead of a mean of all 16: a
        coupling of noise and data (Pooladian et al., arXiv 2304.14772). strangers: bool [N, spots].
        """
        chosen, spots = strangers.nonzero(as_tuple=True)
        codes = self.codes[views[chosen], spots]  # [strangers, SPRITES, 1024]
        strength = torch.einsum("nsd,nd->ns", codes, noise.flatten(1)[chosen])
        index, wanted, strongest = torch.arange(len(chosen)), cast[chosen, spots], strength.argmax(dim=1)
        gain = strength[index, strongest] - strength[index, wanted]
        change = gain[:, None] * (codes[index, wanted] - codes[index, strongest])
        return noise.flatten(1).index_add(0, chosen, change).view(noise.shape)


@dataclass
class Batch:
    """Frames in the order [chunks, streams, frames], stream 0 the clean one; context as `JointAttention` takes it."""

    latents: Tensor  # [chunks * streams * frames, 1, 16, 8, 8]
    timestep: Tensor  # [chunks * streams * frames, 1]
    views: Tensor  # [chunks * streams * frames], number of the prompt
    context: Tensor  # [chunks, frames, columns]
    distance: Tensor
    used: Tensor
    target: Tensor  # [chunks, NOISY, frames, 16, 8, 8]
    weight: Tensor  # the same shape


def noise_levels() -> Tensor:
    """The levels of the sampler's steps."""
    return shifted(torch.tensor(DENOISING_STEPS) / 1000)


def shifted(level: Tensor) -> Tensor:
    return TIMESTEP_SHIFT * level / (1 + (TIMESTEP_SHIFT - 1) * level)


def draw_walks(generator: np.random.Generator, chunks: int) -> np.ndarray:
    """Camera positions [chunks, CHUNK]: half of the walks cut between places, half glide and turn back at times."""
    views = np.empty((chunks, CHUNK), np.int64)
    for walk in views:
        if generator.random() < 0.5:
            here = int(generator.integers(world.PLACES))
            for frame in range(CHUNK):
                if generator.random() < 1 / 3:
                    here = (here + int(generator.integers(1, world.PLACES))) % world.PLACES
                walk[frame] = here * world.VIEWS_PER_PLACE
        else:
            here, step = int(generator.integers(world.VIEWS)), int(generator.choice([-1, 1]))
            for frame in range(CHUNK):
                walk[frame] = here
                step = -step if generator.random() < 0.12 else step
                step = step if 0 <= here + step < world.VIEWS else -step
                here += step
    return views


def draw_contexts(generator: np.random.Generator, views: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Context, distance and used of `Batch` for walks [chunks, CHUNK].

    One layout to a chunk: a window; a sink and a window; or a sink, memory and a window, where memory is the same
    place, if it was seen before, in three of five cases, and any older frames otherwise.
    """
    shape = (len(views), CHUNK, COLUMNS)
    context, distance, used = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    for chunk, walk in enumerate(views):
        layout = generator.choice(["window", "sink", "memory"], p=[0.12, 0.13, 0.75])
        past = {"window": COLUMNS, "sink": SINK_LOCAL, "memory": MEMORY_LOCAL}[str(layout)]
        for frame in range(1, CHUNK):
            entries = [(frame - d, d) for d in range(1, min(past, frame) + 1)]
            if layout != "window" and frame > past and generator.random() > 0.1:
                entries.append((0, min(frame, CONTEXT - 1)))
            if layout == "memory" and frame > past + 1 and generator.random() > 0.12:
                older = np.arange(1, frame - past)
                apart = np.abs(walk[older] - walk[frame])
                near = older[apart == 0] if generator.random() < 0.8 else older[apart <= 2]
                pool = near if len(near) and generator.random() < 0.6 else older
                chosen = generator.choice(pool, min(MEMORY, len(pool)), replace=False)
                entries += [(int(entry), CONTEXT - 1) for entry in chosen]
            count = len(entries)
            context[chunk, frame, :count], distance[chunk, frame, :count] = zip(*entries, strict=True)
            used[chunk, frame, :count] = True
    return torch.from_numpy(context), torch.from_numpy(distance), torch.from_numpy(used)


def draw_batch(latent_world: LatentWorld, generator: np.random.Generator, chunks: int) -> Batch:
    """A batch; walks and contexts from `generator`, noise from torch's."""
    walks = draw_walks(generator, chunks)
    contexts = draw_contexts(generator, walks)
    context, _, used = contexts
    views = torch.from_numpy(walks).flatten()
    cast = torch.from_numpy(world.draw_cast(generator, chunks)).repeat_interleave(CHUNK, dim=0)
    shown = latent_world.shows[views].view(chunks, CHUNK, -1)
    in_context = shown[torch.arange(chunks)[:, None, None], context] & used[..., None]
    return compose(latent_world, views, views, cast, in_context.any(dim=2).flatten(0, 1), contexts)


def compose(
    latent_world: LatentWorld,
    prompts: Tensor,
    views: Tensor,
    cast: Tensor,
    known: Tensor,
    contexts: tuple[Tensor, Tensor, Tensor],
    spot_weight: float = 1.0,
) -> Batch:
    """The batch of what stands where.

    Args:
        prompts: [chunks * CHUNK], number of each frame's prompt.
        views: [chunks * CHUNK], camera positions.
        cast: [chunks * CHUNK, spots], sprites.
        known: bool, same shape: the context or the prompt says who it is.
        contexts: of `draw_contexts`.
        spot_weight: how much more a spot counts than the landscape.
    """
    context, distance, used = contexts
    chunks = len(context)
    phases = torch.arange(CHUNK).remainder(world.PHASES).repeat(chunks)
    cells = latent_world.cell_latents(cast, phases)
    target = latent_world.frames(views, cells)
    strangers = latent_world.shows[views] & ~known

    def blended(probability: float, most: Tensor | float) -> Tensor:
        """Cells in which some inhabitants are mixed with up to `most` of another sprite."""
        other = (cast + torch.randint(1, world.SPRITES, cast.shape)) % world.SPRITES
        share = torch.rand(cast.shape) * most * (torch.rand(cast.shape) < probability)
        return torch.lerp(cells, latent_world.cell_latents(other, phases), share[..., None, None, None])

    # In a roll-out the context is the model's own work: a little noisy, a little blended.
    clean = latent_world.frames(views, blended(0.3, 0.35))
    clean = clean + torch.randn_like(clean) * (0.15 * torch.rand(len(clean), 1, 1, 1))
    inputs, levels = [clean], [torch.zeros(len(clean))]
    for _ in range(NOISY):
        level = noise_levels()[
            torch.multinomial(torch.tensor([0.25, 0.2, 0.2, 0.2, 0.15]), len(clean), replacement=True)
        ]
        level = torch.where(torch.rand(len(clean)) < 0.15, shifted(torch.rand(len(clean)) * 0.98 + 0.01), level)
        coupled = strangers & (level > COUPLED_ABOVE)[:, None]
        noise = latent_world.couple(torch.randn_like(clean), views, cast, coupled)
        # A draft made with the wrong memory shows wrong inhabitants: what the context knows must win over it.
        most = known * torch.where(level > 0.5, 1.0, 0.4)[:, None]
        draft = latent_world.frames(views, blended(0.25, most))
        amount = level[:, None, None, None]
        inputs.append((1 - amount) * draft + amount * noise)
        levels.append(level)

    def by_chunk(streams: list[Tensor]) -> Tensor:
        return torch.stack([stream.unflatten(0, (chunks, CHUNK)) for stream in streams], dim=1)

    level = by_chunk(levels)
    on_spot = latent_world.frames(views, torch.ones_like(cells)) == 1
    weight = (1.0 + spot_weight * on_spot.unflatten(0, (chunks, 1, CHUNK))) / (level[:, 1:] + 0.1)[
        ..., None, None, None
    ]
    return Batch(
        latents=by_chunk(inputs).flatten(0, 2)[:, None],
        timestep=1000 * level.flatten()[:, None],
        views=prompts.view(chunks, 1, CHUNK).expand(-1, 1 + NOISY, -1).flatten(),
        context=context,
        distance=distance,
        used=used,
        target=target.unflatten(0, (chunks, 1, CHUNK)).expand(weight.shape),
        weight=weight,
    )
