"""Infinity-RoPE: relative positions, and a flush of the cache when the scene changes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from longlive_rag.backbones.family import CausalTransformer
from longlive_rag.backbones.follow import Follower
from longlive_rag.backbones.own_context import Said
from longlive_rag.backbones.wan import WanFamily
from longlive_rag.backbones.wan_attention import Arguments
from longlive_rag.config import Positions, RetrievalConfig
from longlive_rag.context import ContextPlan

KEPT_FRAMES = 2
"""Newest frames that the pipeline keeps besides the sink when it flushes its cache."""
CUT_POSITION = 45
"""Where the pipeline puts the first block after a hard cut: far from everything else."""


@dataclass(frozen=True)
class Scene:
    """A scene that begins at `first`, after a hard cut or not; called, the context of one of its blocks."""

    first: int
    cut: bool

    def __call__(self, config: RetrievalConfig, start: int, frames: int) -> ContextPlan:
        return ScenePlan(config, start, frames, self)


@dataclass
class Scenes:
    """The scenes of a video so far."""

    index: weakref.ref[Tensor] | None = None
    """The cache's index at the last pass; a scene change replaces it by a new tensor."""
    current: Scene | None = None
    """None: the first scene, whose context is the common one."""


class InfinityRoPE(WanFamily):
    """Scene changes are read off the cache, whose index the pipeline then replaces by a new tensor."""

    name = "Infinity-RoPE"
    marks = frozenset({"timestep"})

    def positions(self, said: Said, transformer: CausalTransformer) -> Positions:
        return "relative"

    def new_state(self, said: Said) -> Scenes:
        return Scenes()

    def start_pass(
        self, follower: Follower[Scenes], start: int, frames: int, latents: Tensor, arguments: Arguments
    ) -> None:
        cache, frame = arguments["kv_cache"], follower.frame(start)
        index = cache["local_end_index"]
        if frame == 0:
            follower.state = Scenes()
        scenes = follower.state
        if scenes.index is not None and scenes.index() is not index:
            scenes.current = Scene(frame, bool(cache.get("scene_cut")))
        scenes.index = weakref.ref(index)
        follower.follow(start, frames, latents, scenes.current or ContextPlan)


@dataclass(frozen=True)
class ScenePlan(ContextPlan):
    """Until the cache is full again, frames count from its left end, but the block asks from the right end."""

    scene: Scene

    @property
    def _kept(self) -> int:
        return max(self.config.sink_frames, self.scene.first - KEPT_FRAMES)

    @property
    def _full(self) -> bool:
        return self.config.sink_frames + self.end - self._kept > self.config.context_frames

    @property
    def _after_cut(self) -> bool:
        return self.scene.cut and self.start == self.scene.first

    @property
    def local(self) -> range:
        return range(max(super().local.start, self._kept), self.end)

    def fixed_entries(self) -> tuple[list[int], list[int]]:
        frames, positions = super().fixed_entries()
        if not self._full:
            for column, frame in enumerate(frames):
                if frame in self.local:
                    positions[column] = self.config.sink_frames + frame - self._kept
                if self._after_cut and frame >= self.start:
                    positions[column] = CUT_POSITION + frame - self.start
        return frames, positions

    def query_positions(self) -> list[int]:
        if self._after_cut:
            return list(range(CUT_POSITION, CUT_POSITION + self.frames))
        if self._full or self.start < self.config.context_frames:
            return super().query_positions()
        return list(range(self.config.context_frames - self.frames, self.config.context_frames))
