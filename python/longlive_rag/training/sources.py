"""What a corpus is made of: the true videos of the small world, or a generator's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from longlive_rag.config import RetrievalConfig
from longlive_rag.generation.rollout import Prompts, rollout
from longlive_rag.models import CausalWanModel
from longlive_rag.small_world import world
from longlive_rag.small_world.backbone import Backbone
from longlive_rag.small_world.codec import LATENT_CHANNELS, LATENT_SIZE, Codec
from longlive_rag.small_world.measure import prompt_schedule

SMALL_WORLD_SHAPE = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
SHORTEST_VISIT, LONGEST_VISIT = 3, 10
_ENCODED_AT_ONCE = 512


def random_walk(generator: np.random.Generator, frames: int) -> world.Walk:
    """A walk unlike those of the benchmark: visits of random length in random order, or pans that turn anywhere."""
    track = world.TRACKS[generator.integers(len(world.TRACKS))]
    views: list[int] = []
    if track == "cuts":
        place = int(generator.integers(world.PLACES))
        while len(views) < frames:
            views += [place * world.VIEWS_PER_PLACE] * int(generator.integers(SHORTEST_VISIT, LONGEST_VISIT + 1))
            place = (place + int(generator.integers(1, world.PLACES))) % world.PLACES
    else:
        view = int(generator.integers(world.VIEWS))
        while len(views) < frames:
            target = int(generator.integers(world.VIEWS))
            views += range(view, target, 1 if target > view else -1)
            view = target
    phases = (np.arange(frames) + generator.integers(world.PHASES)) % world.PHASES
    return world.Walk(track, np.array(views[:frames]), phases, lap=frames)


def truth_metadata(walk: world.Walk) -> dict[str, str]:
    """What a corpus file says about its video: where the camera stands, and the beat."""
    return {
        "track": walk.track,
        "views": json.dumps(walk.views.tolist()),
        "phases": json.dumps(walk.phases.tolist()),
    }


def encode_frames(codec: Codec, views: np.ndarray, phases: np.ndarray, cast: np.ndarray) -> Tensor:
    """Latents [N, 16, 8, 8] of rendered frames; arguments of `world.render`, all of length N."""
    pieces = [slice(first, first + _ENCODED_AT_ONCE) for first in range(0, len(views), _ENCODED_AT_ONCE)]
    cast = np.broadcast_to(cast, (len(views), len(world.SPOTS)))
    return torch.cat([codec.encode(world.render(views[p], phases[p], cast[p])) for p in pieces])


class WorldSource:
    """True videos of the small world, rendered and encoded by its codec."""

    def __init__(self, codec: Codec, frames: int, seed: int) -> None:
        self.codec, self.frames, self.seed = codec, frames, seed
        self.settings: dict[str, str | int | float] = {"source": "world", "frames": frames, "seed": seed}
        self.batch = 1
        self.video_bytes = 4 * frames * math.prod(SMALL_WORLD_SHAPE)

    def make(self, numbers: Sequence[int]) -> list[tuple[Tensor, dict[str, str]]]:
        videos = []
        for number in numbers:
            generator = np.random.default_rng([self.seed, number])
            walk, cast = random_walk(generator, self.frames), world.draw_cast(generator, 1)[0]
            latents = encode_frames(self.codec, walk.views, walk.phases, cast)
            about = {"source": "world", **truth_metadata(walk), "cast": json.dumps(cast.tolist())}
            videos.append((latents, about))
        return videos


def small_world_prompts(model: Backbone, frames: int, seed: int) -> Callable[[int], tuple[Prompts, dict[str, str]]]:
    """The prompt pool of the small world: a random camera walk for every video."""

    def prompts(number: int) -> tuple[Prompts, dict[str, str]]:
        generator = np.random.default_rng([seed, number])
        walk = random_walk(generator, frames)
        return prompt_schedule(model, walk), truth_metadata(walk)

    return prompts


class GeneratorSource:
    """Roll-outs of a frozen causal Wan model.

    Args:
        model: the generator.
        prompts: from a video's number to its prompt embeddings [1, text_len, text_dim], or schedule, and metadata.
        latent_shape: channels, height, width.
        frames: latent frames of a video, whole blocks.
        config: the context policy.
        denoising_steps, timestep_shift: as `rollout`.
        name: of the generator, for the record.
        batch: videos made together.
    """

    def __init__(
        self,
        model: CausalWanModel,
        prompts: Callable[[int], tuple[Prompts, dict[str, str]]],
        latent_shape: tuple[int, int, int],
        frames: int,
        config: RetrievalConfig,
        *,
        denoising_steps: Sequence[float],
        timestep_shift: float,
        seed: int,
        name: str,
        batch: int = 1,
    ) -> None:
        if frames < 1 or frames % config.block_frames:
            raise ValueError(f"frames must be whole blocks of {config.block_frames} latent frames, got {frames}")
        self.model, self.prompts, self.config = model, prompts, config
        self.shape = (frames, *latent_shape)
        self.denoising_steps, self.timestep_shift, self.seed = denoising_steps, timestep_shift, seed
        self.batch = batch
        self.video_bytes = math.prod(self.shape) * model.patch_embedding.weight.element_size()
        self.settings: dict[str, str | int | float] = {
            "source": name,
            "frames": frames,
            "seed": seed,
            "denoising_steps": " ".join(map(str, denoising_steps)),
            "timestep_shift": timestep_shift,
            **asdict(config),
        }

    def make(self, numbers: Sequence[int]) -> list[tuple[Tensor, dict[str, str]]]:
        weight = self.model.patch_embedding.weight
        generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + number) for number in numbers]

        # Drawn on the CPU: the same on every device.
        def draw(shape: Sequence[int]) -> Tensor:
            return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(weight.device)

        prompts, metadata = zip(*map(self.prompts, numbers), strict=True)
        result = rollout(
            self.model,
            draw(self.shape).to(weight.dtype),
            merge_prompts(prompts),
            self.config,
            denoising_steps=self.denoising_steps,
            timestep_shift=self.timestep_shift,
            renoise=lambda _, shape: draw((shape[0] // len(numbers), *shape[1:])).flatten(0, 1),
        )
        if result.interrupted:
            raise KeyboardInterrupt
        about = [{"source": str(self.settings["source"]), "seed": str(self.seed), **each} for each in metadata]
        return list(zip(result.latents, about, strict=True))


def merge_prompts(prompts: Sequence[Prompts]) -> list[tuple[int, Tensor]]:
    """One schedule for a batch from the prompts or schedules of its videos, embeddings [1, text_len, text_dim] each."""
    schedules = [[(0, each)] if isinstance(each, Tensor) else list(each) for each in prompts]
    merged = []
    for start in sorted({start for schedule in schedules for start, _ in schedule}):
        current = [[embeds for first, embeds in schedule if first <= start][-1] for schedule in schedules]
        merged.append((start, torch.cat(current)))
    return merged
