"""Videos of the small world under each context policy, and the answer to "did it stay itself?"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from longlive_rag.budget import Budget
from longlive_rag.embedding import Embedding
from longlive_rag.generation.rollout import FinishedBlock, stream
from longlive_rag.generation.sampling import Sampling
from longlive_rag.intervals import bootstrap_interval
from longlive_rag.small_world import world
from longlive_rag.small_world.backbone import (
    DENOISING_STEPS,
    TIMESTEP_SHIFT,
    SmallBackbone,
    load_backbone,
    load_codec,
    load_encoder,
)
from longlive_rag.small_world.codec import LATENT_CHANNELS, LATENT_SIZE, Codec
from longlive_rag.small_world.policies import POLICIES, Policy
from longlive_rag.small_world.workers import Tick, in_processes

AWAY = 5  # an inhabitant out of sight for more frames than this has left every window


@dataclass(frozen=True)
class Recall:
    """What one block of every video retrieved, most similar first."""

    block_start: int
    frames: list[list[int]]
    similarity: list[list[float]]


@dataclass(frozen=True)
class Videos:
    """Videos of one policy."""

    frames: np.ndarray  # uint8 [videos, frames, 64, 64, 3]
    recalls: list[Recall]  # one for each block with memory


@dataclass(frozen=True)
class Revisit:
    """An inhabitant comes back into view."""

    frame: int  # the first in which it is wholly visible again
    spot: int
    first_seen: int  # last frame of its first visit


def revisits(walk: world.Walk) -> list[Revisit]:
    """Every return, after the first lap, of an inhabitant that was not wholly visible for more than `AWAY` frames."""
    found = []
    for spot in range(len(world.SPOTS)):
        seen = np.flatnonzero([spot in world.visible_spots(int(view)) for view in walk.views])
        breaks = np.flatnonzero(np.diff(seen) > 1)
        for last, frame in zip(seen[breaks], seen[breaks + 1], strict=True):
            if frame >= walk.lap and frame - last - 1 > AWAY:
                found.append(Revisit(int(frame), spot, int(seen[breaks[0]])))
    return sorted(found, key=lambda revisit: (revisit.frame, revisit.spot))


def prompt_schedule(model: SmallBackbone, walk: world.Walk) -> list[tuple[int, Tensor]]:
    """The prompt of each camera position and the first frame it applies to."""
    return [
        (frame, model.prompts[int(view)][None])
        for frame, view in enumerate(walk.views)
        if frame == 0 or view != walk.views[frame - 1]
    ]


def initial_noise(seed: int, videos: int, frames: int) -> Tensor:
    """[videos, frames, 16, 8, 8], the same for every policy: videos are compared in pairs."""
    shape = (frames, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    generators = (torch.Generator().manual_seed(1000 * seed + video) for video in range(videos))
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def first_lap(codec: Codec, walk: world.Walk, cast: np.ndarray) -> Tensor:
    """Rendered latents of the first lap: [videos, lap, 16, 8, 8] for casts [videos, spots]."""
    views, phases = walk.views[: walk.lap], walk.phases[: walk.lap]
    return torch.stack([codec.encode(world.render(views, phases, sprites)) for sprites in cast])


def generate(
    model: SmallBackbone,
    policy: Policy,
    walk: world.Walk,
    *,
    seed: int,
    videos: int,
    given: Tensor | None = None,
    embedding: Embedding | None = None,
    budget: Budget | None = None,
    prompts: list[tuple[int, Tensor]] | None = None,
) -> Iterator[FinishedBlock]:
    """Stream `videos` videos of one policy.

    Args:
        given: [videos, lap, 16, 8, 8], stands for the first lap.
        embedding: what memory is searched by; default the bundled encoder.
        prompts: default one for each camera position.
    """
    noise = initial_noise(seed, videos, len(walk.views))
    return stream(
        model,
        noise.split(policy.config.block_frames, dim=1),
        prompts or prompt_schedule(model, walk),
        policy.config,
        embedding=embedding or load_encoder(),
        sampling=Sampling(DENOISING_STEPS, TIMESTEP_SHIFT, seed=seed),
        selection=policy.selection(walk, seed) if policy.selection else None,
        given=given,
        budget=budget,
    )


def collect(codec: Codec, blocks: Iterable[FinishedBlock], tick: Tick = lambda frames: None) -> Videos:
    """Decode a stream; `tick` is called with the number of frames of every finished block."""
    frames, recalls = [], []
    for block in blocks:
        batch, length = block.latents.shape[:2]
        frames.append(codec.decode(block.latents.flatten(0, 1)).reshape(batch, length, world.SIZE, world.SIZE, 3))
        if block.retrieval is not None:
            recalls.append(Recall(block.start, block.retrieval.frames, block.retrieval.similarity))
        tick(length)
    return Videos(np.concatenate(frames, axis=1), recalls)


def answers(walk: world.Walk, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode what a score needs from videos [videos, frames, 64, 64, 3].

    Returns:
        Three arrays [videos, revisits]: who was there at the end of the first visit; who is there at the return; the
        latter's distance from a rendered sprite.
    """
    events = revisits(walk)
    needed = sorted({event.frame for event in events} | {event.first_seen for event in events})
    place = {frame: index for index, frame in enumerate(needed)}
    decoded = [world.decode(video[needed], walk.views[needed]) for video in frames]
    sprites, errors = (np.stack(part) for part in zip(*decoded, strict=True))
    spots = [event.spot for event in events]
    first, now = ([place[getattr(event, name)] for event in events] for name in ("first_seen", "frame"))
    return sprites[:, first, spots], sprites[:, now, spots], errors[:, now, spots]


@dataclass(frozen=True)
class Score:
    """Share of inhabitants that are still themselves when they come back."""

    correct: np.ndarray  # bool [videos, revisits]
    chance: float
    error: float

    def interval(self, chosen: np.ndarray | None = None) -> dict[str, float | int]:
        """Mean over videos with its 95% bootstrap interval over videos, as the report holds it."""
        correct = self.correct if chosen is None else self.correct[:, chosen]
        each = correct.mean(axis=1)
        low, high = bootstrap_interval(each)
        numbers = {"mean": each.mean(), "low": low, "high": high}
        return {**{name: round(float(value), 4) for name, value in numbers.items()}, "videos": len(each)}


def score(truth: np.ndarray, now: np.ndarray, error: np.ndarray) -> Score:
    """Compare who should be there [videos, revisits] with who is.

    Chance is what the same answers reach against the truth of *other* videos: not 1 / 16 where a model prefers some
    sprites.
    """
    crossed = [now == np.roll(truth, shift, axis=0) for shift in range(1, len(truth))]
    return Score(now == truth, float(np.mean(crossed)), float(error.mean()))


def measure(
    model: SmallBackbone,
    codec: Codec,
    policy: Policy,
    walk: world.Walk,
    *,
    seed: int,
    videos: int,
    given: bool,
    embedding: Embedding | None = None,
    budget: Budget | None = None,
    tick: Tick = lambda frames: None,
) -> tuple[Score, Videos]:
    """Generate and score.

    Args:
        given: the first lap is rendered; else it is the model's own.
        embedding: what memory is searched by; default the bundled encoder.
        budget: of the memory; default all that there is.
        tick: called with the number of frames of every finished block.
    """
    cast = world.draw_cast(np.random.default_rng(seed), videos)
    lap = first_lap(codec, walk, cast) if given else None
    blocks = generate(model, policy, walk, seed=seed, videos=videos, given=lap, embedding=embedding, budget=budget)
    result = collect(codec, blocks, tick)
    first, now, error = answers(walk, result.frames)
    truth = cast[:, [event.spot for event in revisits(walk)]] if given else first
    return score(truth, now, error), result


# ---- all policies, in worker processes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One policy, with the first lap given or generated."""

    policy: str
    given: bool


@dataclass(frozen=True)
class _Job:
    condition: Condition
    walk: world.Walk
    seed: int
    videos: int


def measure_all(
    track: str, frames: int, *, policies: Sequence[str], seed: int, videos: int, tick: Tick, workers: int | None = None
) -> dict[Condition, tuple[Score, Videos]]:
    """Measure the bundled backbone under several policies; see `workers.in_processes`."""
    walk = world.walk(track, frames)
    conditions = [Condition(policy, given) for policy in policies for given in (True, False)]
    jobs = [_Job(condition, walk, seed, videos) for condition in conditions]
    results = {job.condition: result for job, result in in_processes(_measure_job, jobs, tick, workers)}
    return {condition: results[condition] for condition in conditions}


def _measure_job(job: _Job, tick: Tick) -> tuple[Score, Videos]:
    model, codec = _models()
    policy, given = POLICIES[job.condition.policy], job.condition.given
    return measure(model, codec, policy, job.walk, seed=job.seed, videos=job.videos, given=given, tick=tick)


@cache
def _models() -> tuple[SmallBackbone, Codec]:
    return load_backbone(), load_codec()
