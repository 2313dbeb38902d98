"""What `longlive-rag corpus` makes of the small world: its true videos, or the bundled backbone's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from longlive_rag.generation.rollout import Prompts
from longlive_rag.small_world import light, world
from longlive_rag.small_world.backbone import DENOISING_STEPS, TIMESTEP_SHIFT, SmallBackbone
from longlive_rag.small_world.codec import LATENT_SHAPE, Codec
from longlive_rag.small_world.measure import prompt_schedule
from longlive_rag.small_world.policies import POLICIES
from longlive_rag.training.sources import GeneratorSource

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
    """What a corpus file says about its video: the camera's position and the beat in each frame."""
    return {
        "track": walk.track,
        "views": json.dumps(walk.views.tolist()),
        "phases": json.dumps(walk.phases.tolist()),
    }


def encode_frames(codec: Codec, views: np.ndarray, phases: np.ndarray, cast: np.ndarray) -> Tensor:
    """Latents [N, 16, 8, 8] of rendered frames.

    views, phases: [N]; cast: [N, spots] or [spots]; as `world.render` takes them.
    """
    pieces = [slice(first, first + _ENCODED_AT_ONCE) for first in range(0, len(views), _ENCODED_AT_ONCE)]
    cast = np.broadcast_to(cast, (len(views), len(world.SPOTS)))
    return torch.cat([codec.encode(world.render(views[p], phases[p], cast[p])) for p in pieces])


class WorldSource:
    """True videos of the small world, rendered and encoded by its codec.

    Args:
        night: at all hours, each video beginning at another (`light.py`), instead of in daylight.
    """

    def __init__(self, codec: Codec, frames: int, seed: int, night: bool = False) -> None:
        self.codec, self.frames, self.seed, self.night = codec, frames, seed, night
        name = "night" if night else "world"
        self.settings: dict[str, str | int | float] = {"source": name, "frames": frames, "seed": seed}
        self.batch = 1
        self.video_bytes = 4 * frames * math.prod(LATENT_SHAPE)

    def make(self, numbers: Sequence[int]) -> list[tuple[Tensor, dict[str, str]]]:
        """Latents [frames, 16, 8, 8] and metadata of each video."""
        videos = []
        for number in numbers:
            generator = np.random.default_rng([self.seed, number])
            walk, cast = random_walk(generator, self.frames), world.draw_cast(generator, 1)[0]
            latents = encode_frames(self.codec, walk.views, walk.phases, cast)
            about = {**truth_metadata(walk), "source": str(self.settings["source"]), "cast": json.dumps(cast.tolist())}
            if self.night:
                begin = int(generator.integers(light.CYCLE))
                latents = light.lights().cast(latents, begin)
                about["begin"] = str(begin)
            videos.append((latents, about))
        return videos


def rollout_source(model: SmallBackbone, frames: int, *, seed: int, batch: int) -> GeneratorSource:
    """The backbone's own videos over random camera walks, under the demo's retrieval policy.

    Args:
        frames: latent frames of a video.
        seed: of walks and noise.
        batch: videos made together.
    """
    return GeneratorSource(
        model,
        _walk_prompts(model, frames, seed),
        LATENT_SHAPE,
        frames,
        POLICIES["retrieval"].config,
        denoising_steps=DENOISING_STEPS,
        timestep_shift=TIMESTEP_SHIFT,
        seed=seed,
        name="small-world",
        batch=batch,
    )


def _walk_prompts(model: SmallBackbone, frames: int, seed: int) -> Callable[[int], tuple[Prompts, dict[str, str]]]:
    """From a video's number to the prompts of its random walk, and its metadata."""

    def prompts(number: int) -> tuple[Prompts, dict[str, str]]:
        generator = np.random.default_rng([seed, number])
        walk = random_walk(generator, frames)
        return prompt_schedule(model, walk), truth_metadata(walk)

    return prompts
