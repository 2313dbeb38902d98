"""The track `night`: light and weather change from visit to visit; does memory find the place, or its colour?

The inhabitants and the walk are those of `cuts`; a day of 25 frames goes round over laps of 20. So a place is seen in
another light at each visit, and at night all places look alike (`light.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longlive_rag.embedding import AveragePool, Embedding, LatentAutoencoder, LayoutPool
from longlive_rag.generation.rollout import FinishedBlock
from longlive_rag.small_world import light, measure, world
from longlive_rag.small_world.backbone import ASSETS, SmallBackbone, load_codec, load_encoder, load_weights
from longlive_rag.small_world.codec import Codec
from longlive_rag.small_world.measure import Recall, Revisit
from longlive_rag.small_world.policies import POLICIES, Policy
from longlive_rag.small_world.report import KEPT, LOST, Setting
from longlive_rag.small_world.tracks import night_report
from longlive_rag.small_world.tracks.track import Models, Outcome, Size, Track, Values

ENCODERS = ("full", "without_delta", "without_smoothing", "reconstruction_only", "paper_weights")
"""The retrieval encoders that `longlive-rag train --ablation` made of this world's latents."""


@cache
def load_night_encoder(name: str) -> LatentAutoencoder:
    """One of `ENCODERS`; raises as `LatentAutoencoder.from_checkpoint`."""
    return LatentAutoencoder.from_checkpoint(ASSETS / f"night_encoder_{name}.safetensors").requires_grad_(False)


def _draft(label: str, embedding: Embedding | str) -> Policy:
    """The draft asks, and memory is searched by this embedding, or by the encoder of this name."""

    def load() -> Embedding:
        return load_night_encoder(embedding) if isinstance(embedding, str) else embedding

    return dataclasses.replace(POLICIES["retrieval"], label=label, embedding=load)


NIGHT_POLICIES = {
    **{name: POLICIES[name] for name in ("sliding_window", "sink_window", "recent", "random", "latest_query")},
    "average_pool": _draft("draft, average pool", AveragePool()),
    "grid": _draft("draft, 4 x 4 average pool", AveragePool(grid=4)),
    "reconstruction": _draft("draft, encoder: reconstruction only", "reconstruction_only"),
    "delta": _draft("draft, encoder: + delta", "without_smoothing"),
    "smoothing": _draft("draft, encoder: + smoothing", "without_delta"),
    "paper_weights": _draft("draft, encoder: + both at the paper's weights", "paper_weights"),
    "retrieval": dataclasses.replace(POLICIES["retrieval"], label="draft, encoder: + both"),
    "day_encoder": dataclasses.replace(
        POLICIES["retrieval"], label="draft, the demo's encoder, trained by day", embedding=load_encoder
    ),
    "layout": _draft("draft, 4 x 4 layout, without the light", LayoutPool()),
    "oracle": POLICIES["oracle"],
}
SHOWN_PLACE = 1  # in the picture


class NightTrack(Track):
    """Cuts between four places while the day goes round."""

    name, question = "night", "Each visit has another light: is the place found again, or only its colour?"
    size, quick = Size(laps=4, videos=8), Size(laps=3, videos=2)
    policies = NIGHT_POLICIES

    def walk(self, laps: int) -> world.Walk:
        return world.walk("cuts", world.lap_frames("cuts", laps))

    def models(self, training: int) -> Models:
        backbone = light.LitBackbone()
        load_weights(backbone, ASSETS / "backbone.safetensors")
        return Models(backbone.eval().requires_grad_(False), load_codec(), load_night_encoder("full"))

    def draw(self, seed: int, videos: int) -> np.ndarray:
        return world.draw_cast(np.random.default_rng(seed), videos)

    def render(self, walk: world.Walk, frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """In daylight."""
        return world.render(walk.views[frames], walk.phases[frames], truth)

    def first_lap(self, codec: Codec, walk: world.Walk, truth: np.ndarray) -> Tensor:
        return light.lights().cast(super().first_lap(codec, walk, truth))

    def prompts(self, backbone: SmallBackbone, walk: world.Walk) -> list[tuple[int, Tensor]]:
        """One for each frame: the place's words and the moment's."""
        words = backbone.prompts.shape[2]
        return [
            (frame, torch.cat([backbone.prompts[int(view)], light.moment(frame, words)])[None])
            for frame, view in enumerate(walk.views)
        ]

    def daylight(self, blocks: Iterable[FinishedBlock]) -> Iterable[FinishedBlock]:
        """Blocks without the light: who is there is read from these."""
        lights = light.lights()
        return (dataclasses.replace(block, latents=lights.lift(block.latents, block.start)) for block in blocks)

    def measure(self, walk: world.Walk, truth: np.ndarray, given: bool, frames: np.ndarray) -> Outcome:
        """Who should be there and who is at each of `returns`; for the picture, the first video's arrivals at one
        place as they are seen, with every inhabitant underlined, in green if it is the one that was there."""
        events = measure.revisits(walk)
        chosen = [index for index, event in enumerate(events) if event in returns(walk)]
        first, now, error = (part[:, chosen] for part in measure.answers(walk, frames))
        if given:
            first = truth[:, [events[index].spot for index in chosen]]
        shown = np.flatnonzero(walk.views == SHOWN_PLACE * world.VIEWS_PER_PLACE)[:: world.DWELL]
        pictures = light.shine(frames[0, shown], shown)
        for event, right in zip(returns(walk), (now == first)[0], strict=True):
            if event.frame in shown:
                x, y = world.SPOTS[event.spot][0] % world.SIZE, world.SPOTS[event.spot][1]
                line = np.s_[y + world.CELL - 2 : y + world.CELL, x + 2 : x + world.CELL - 2]
                pictures[int(np.flatnonzero(shown == event.frame)[0])][line] = KEPT if right else LOST
        return Outcome({"truth": first, "now": now, "error": error}, pictures)

    def retrieval(self, walk: world.Walk, recalls: list[Recall], videos: int) -> dict[str, np.ndarray]:
        """Adds `found` [videos, arrivals]: the right share of what was retrieved at each arrival at a judged place."""
        when = {int(start): column for column, start in enumerate(arrivals(walk))}
        found = np.full((videos, len(when)), np.nan)
        for recall in recalls:
            if recall.block_start in when:
                for video, row in enumerate(recall.frames):
                    right = self.right(walk, recall.block_start, np.array(row, dtype=int))
                    found[video, when[recall.block_start]] = right.mean() if len(row) else np.nan
        return {**super().retrieval(walk, recalls, videos), "found": found}

    def summarise(self, walk: world.Walk, cells: Mapping[Setting, Values]) -> dict[str, Any]:
        frames = np.array([event.frame for event in returns(walk)])
        return {
            setting: night_report.summary(walk, values, frames, np.unique(frames)) for setting, values in cells.items()
        }

    def compare(self, walk: world.Walk, cells: Mapping[str, Values]) -> dict[str, Any]:
        return night_report.pairs(self, cells)

    def headline(self, policies: Mapping[str, Mapping[str, Any]]) -> str:
        return night_report.table(policies)

    def draw_picture(
        self, path: Path, facts: Mapping[str, Any], cells: Mapping[str, Values], pictures: Mapping[str, np.ndarray]
    ) -> None:
        night_report.draw(self, path, facts, pictures)


def returns(walk: world.Walk) -> list[Revisit]:
    """Of the inhabitants that the sink, the first frame, does not show."""
    return [e for e in measure.revisits(walk) if e.spot not in world.visible_spots(int(walk.views[0]))]


def arrivals(walk: world.Walk) -> np.ndarray:
    """Frames in which inhabitants return."""
    return np.unique([event.frame for event in returns(walk)])


NIGHT = NightTrack()
