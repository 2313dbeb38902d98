"""Training batches of the crowd track: sixteen places, four of each landscape."""

from __future__ import annotations

import numpy as np
import torch

from longlive_rag.small_world import crowd, world
from training_data import CHUNK, Batch, LatentWorld, compose, draw_contexts

LANDSCAPES_IN_CHUNK, TWINS_IN_CHUNK = 2, 2  # so that a chunk comes back to its places, and confuses them
PROMPT_SPREAD = 0.5
SPOT_WEIGHT = 4.0  # the landscapes are known already


def start_prompts(prompts: torch.Tensor) -> torch.Tensor:
    """Prompts to begin with, of those of the camera positions [VIEWS, tokens, width]: prompt p is of place p.

    Each is the prompt of its landscape and a random direction of its host's colour, shared by the landscapes.
    """
    colours = torch.randn(crowd.TWINS, *prompts.shape[1:], generator=torch.Generator().manual_seed(0))
    places = np.arange(crowd.PLACES)
    begun = prompts.clone()
    begun[places] = prompts[crowd.views(places)] + PROMPT_SPREAD * colours[places % crowd.TWINS]
    return begun


def draw_walks(generator: np.random.Generator, chunks: int) -> np.ndarray:
    """Places [chunks, CHUNK]; in a third of the frames the camera jumps to another of the chunk's places."""
    places = np.empty((chunks, CHUNK), np.int64)
    for walk in places:
        landscapes = generator.permutation(world.PLACES)[:LANDSCAPES_IN_CHUNK]
        here = np.concatenate(
            [crowd.TWINS * k + generator.permutation(crowd.TWINS)[:TWINS_IN_CHUNK] for k in landscapes]
        )
        at = int(generator.integers(len(here)))
        for frame in range(CHUNK):
            if generator.random() < 1 / 3:
                at = (at + int(generator.integers(1, len(here)))) % len(here)
            walk[frame] = here[at]
    return places


def draw_batch(latent_world: LatentWorld, generator: np.random.Generator, chunks: int) -> Batch:
    """A batch, as `training_data.draw_batch`; the prompt names the host."""
    walks = draw_walks(generator, chunks)
    contexts = draw_contexts(generator, walks * world.VIEWS_PER_PLACE)
    context, _, used = contexts
    places, video = walks.ravel(), np.repeat(np.arange(chunks), CHUNK)
    crowds = crowd.draw_crowds(generator, chunks)
    cast = torch.from_numpy(crowd.cast(places, crowds[video, places]))
    walks_seen = torch.from_numpy(walks)
    same = walks_seen[torch.arange(chunks)[:, None, None], context] == walks_seen[..., None]
    known = (same & used).any(dim=2).flatten()[:, None]  # the context shows this place
    host = torch.zeros(len(places), world.PLACES, crowd.SPOTS_PER_PLACE, dtype=torch.bool)
    host[..., crowd.HOST] = True
    return compose(
        latent_world,
        torch.from_numpy(places),
        torch.from_numpy(crowd.views(places)),
        cast,
        known | host.flatten(1),
        contexts,
        SPOT_WEIGHT,
    )
