"""Rolling Forcing: a window of blocks at falling noise levels, and a clean pass over the first of them."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import Tensor

from longlive_rag.backbones.family import CausalTransformer
from longlive_rag.backbones.follow import Follower
from longlive_rag.backbones.own_context import Said
from longlive_rag.backbones.wan import WanFamily
from longlive_rag.backbones.wan_attention import Arguments
from longlive_rag.config import Positions
from longlive_rag.context import ContextPlan

PUBLISHED_STEPS = 5
"""Denoising steps, where only the pipeline could say."""


class RollingForcing(WanFamily):
    """The window's later blocks are seen by nothing but the window, so only the clean pass can finish a block."""

    name = "Rolling Forcing"
    marks = frozenset({"updating_cache"})
    drafts = False

    def longest_pass(self, model: Any, transformer: CausalTransformer) -> int | None:
        # The window holds one block at each noise level.
        block, steps = super().longest_pass(model, transformer), getattr(model, "denoising_step_list", None)
        if block is None:
            return None
        return block * (len(steps) if isinstance(steps, Sized) else PUBLISHED_STEPS)

    def window(self, said: Said) -> int | None:
        attended, tokens = said.integer("max_attention_size"), said.integer("frame_length")
        return attended // tokens if attended and tokens else None

    def sink(self, said: Said) -> int:
        block, tokens = said.integer("block_length"), said.integer("frame_length")
        return block // tokens if block and tokens else 0

    def positions(self, said: Said, transformer: CausalTransformer) -> Positions:
        return "relative"

    def start_pass(
        self, follower: Follower[Any], start: int, frames: int, latents: Tensor, arguments: Arguments
    ) -> None:
        follower.follow(start, frames, latents, CleanPlan if arguments.get("updating_cache") else WindowPlan)


class WindowPlan(ContextPlan):
    """Context of the window of blocks."""

    def keeps(self, frame: int) -> bool:
        # The clean pass looks further back than the window.
        oldest = self.start + self.config.block_frames - self.config.context_frames
        return frame < self.config.sink_frames or frame >= oldest


class CleanPlan(WindowPlan):
    """Context of the clean pass: without the sink, and that much longer in the past."""

    @property
    def local_columns(self) -> int:
        return self.config.local_frames + self.config.sink_frames

    @property
    def sink(self) -> range:
        return range(0)
