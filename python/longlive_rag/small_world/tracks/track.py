"""What a track of the memory benchmark has to say; the runner (`bench_memory.py`) does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longlive_rag.embedding import Embedding
from longlive_rag.generation.rollout import FinishedBlock
from longlive_rag.small_world import measure, world
from longlive_rag.small_world.backbone import SmallBackbone
from longlive_rag.small_world.codec import Codec
from longlive_rag.small_world.measure import Recall
from longlive_rag.small_world.policies import Policy
from longlive_rag.small_world.report import Setting

Values = Mapping[str, np.ndarray]
"""What is kept of a cell: arrays [videos, ...]."""


class Models(NamedTuple):
    """What a track generates with."""

    backbone: SmallBackbone
    codec: Codec
    encoder: Embedding
    """What memory is searched by, unless a policy brings its own."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    laps: int
    videos: int
    brief: bool = False
    """One training, its first lap given, and of the policies those that `Track.brief` names."""


@dataclass(frozen=True)
class Cell:
    """One unit of the work: a policy on a track, with the first lap given (rendered) or generated, by one training."""

    track: str
    policy: str
    setting: Setting
    training: int

    @property
    def key(self) -> str:
        return f"{self.policy}/{self.setting}/{self.training}"


@dataclass(frozen=True)
class Outcome:
    """What a cell found."""

    values: Values
    pictures: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8))
    """uint8 [N, H, W, 3]: what the track's picture shows of this cell, if anything."""


class Track(ABC):
    """A question to the memory, asked on videos whose answer is known."""

    name: str
    question: str
    """One sentence, the title of the picture."""
    size: Size
    quick: Size
    policies: Mapping[str, Policy]
    """In the order in which they are shown; controls and oracles are policies too. A policy's config has the length of
    the blocks."""
    brief: tuple[str, ...] = ()
    """Policies of a brief measurement; default all."""
    trainings: int = 1
    """Backbones that were trained alike from other seeds."""
    settings: tuple[Setting, ...] = ("given", "generated")

    @abstractmethod
    def walk(self, laps: int) -> world.Walk:
        """Where the camera stands in each frame of a video of so many laps."""

    @abstractmethod
    def models(self, training: int) -> Models:
        """What to generate with, loaded."""

    @abstractmethod
    def draw(self, seed: int, videos: int) -> np.ndarray:
        """The truth of the videos, [videos, ...]: who lives in their worlds."""

    @abstractmethod
    def render(self, walk: world.Walk, frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """True pictures uint8 [N, 64, 64, 3] of frames [N] of the world `truth`, one entry of `draw`."""

    @abstractmethod
    def measure(self, walk: world.Walk, truth: np.ndarray, given: bool, frames: np.ndarray) -> Outcome:
        """What one cell found.

        Args:
            truth: of `draw`.
            given: the first lap was rendered from it; else the model made its own, and that is what later laps are held
                to.
            frames: uint8 [videos, frames, 64, 64, 3].
        """

    @abstractmethod
    def summarise(self, walk: world.Walk, cells: Mapping[Setting, Values]) -> dict[str, Any]:
        """What the JSON says of a policy.

        Args:
            cells: of every setting measured so far, its values stacked over trainings: [trainings, videos, ...].
        """

    def compare(self, walk: world.Walk, cells: Mapping[str, Values]) -> dict[str, Any]:
        """What the JSON says of pairs of policies on the same videos; `cells` by `Cell.key`."""
        return {}

    @abstractmethod
    def headline(self, policies: Mapping[str, Mapping[str, Any]]) -> str:
        """The table that the command prints, of the summaries."""

    @abstractmethod
    def draw_picture(
        self, path: Path, facts: Mapping[str, Any], cells: Mapping[str, Values], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """The track's picture, which a reader understands without the text.

        Args:
            facts: of the track, as in the JSON.
            cells: values of every cell, by `Cell.key`.
            pictures: of every cell, by `Cell.key`; missing ones were not kept.
        """

    # ---- what most tracks share ------------------------------------------------------------------------------------

    def prompts(self, backbone: SmallBackbone, walk: world.Walk) -> list[tuple[int, Tensor]]:
        """The schedule of prompts: one for each camera position."""
        return measure.prompt_schedule(backbone, walk)

    def first_lap(self, codec: Codec, walk: world.Walk, truth: np.ndarray) -> Tensor:
        """Rendered latents [videos, lap, 16, 8, 8]."""
        frames = np.arange(walk.lap)
        return torch.stack([codec.encode(self.render(walk, frames, video)) for video in truth])

    def daylight(self, blocks: Iterable[FinishedBlock]) -> Iterable[FinishedBlock]:
        """Blocks as the codec decodes them; a track with a light of its own takes it away here."""
        return blocks

    def right(self, walk: world.Walk, start: int, frames: np.ndarray) -> np.ndarray:
        """Whether retrieved frames show what the block at `start` needs: bool, like `frames`."""
        return walk.views[frames] == walk.views[start]

    def retrieval(self, walk: world.Walk, recalls: list[Recall], videos: int) -> dict[str, np.ndarray]:
        """Of the frames retrieved where the camera arrives, after the first lap: the share that is `right`, and among
        these the share from the first lap. [videos], NaN where nothing was retrieved."""
        right, old = np.zeros((2, videos))
        count, right_count = np.zeros((2, videos))
        for recall in recalls:
            start = recall.block_start
            if start < walk.lap or walk.views[start] == walk.views[start - 1]:
                continue
            for video, row in enumerate(recall.frames):
                frames = np.array(row, dtype=int)
                good = self.right(walk, start, frames)
                right[video] += good.sum()
                count[video] += len(row)
                old[video] += (good & (frames < walk.lap)).sum()
                right_count[video] += good.sum()
        with np.errstate(invalid="ignore"):
            return {"retrieved_right": right / count, "retrieved_from_first_lap": old / right_count}
