"""LongLive 2 (Wan 2.2 5B): compressed time, shots that stand apart in time, and chunks pinned in the context."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longlive_rag.backbones.families.longlive import LongLive
from longlive_rag.backbones.family import CausalTransformer
from longlive_rag.backbones.follow import Follower
from longlive_rag.backbones.own_context import OwnContext, Said
from longlive_rag.backbones.wan_attention import Arguments
from longlive_rag.config import Positions, RetrievalConfig
from longlive_rag.context import UNUSED, ContextPlan


@dataclass(frozen=True)
class Shots:
    """The shots of a video so far; called, the context of a block."""

    offsets: tuple[tuple[int, int], ...] = ((0, 0),)
    """First frame of each shot, and how far its absolute positions are moved."""
    pinned: range = range(0)
    """Frames that the pipeline has pinned in the context, besides the sink."""

    def __call__(self, config: RetrievalConfig, start: int, frames: int) -> ContextPlan:
        return ShotPlan(config, start, frames, self)

    def offset(self, frame: int) -> int:
        return next(offset for first, offset in reversed(self.offsets) if frame >= first)


class LongLive2(LongLive):
    """Its conditional and unconditional passes have a cache each; the cache says what the pipeline has pinned."""

    name = "LongLive 2"
    marks = frozenset({"t_scale", "use_relative_rope", "method", "original_seq_len", "temporal_offset"})

    whole_past = 32

    def positions(self, said: Said, transformer: CausalTransformer) -> Positions:
        return "relative" if said.flag("use_relative_rope") else "absolute"

    def memory_positions(self, own: Positions) -> Positions:
        # Shots stand apart in absolute time, which relative positions would close up.
        return own

    def switch_frames(self, config: RetrievalConfig, own: OwnContext | None) -> int | None:
        return None  # prompts change from chunk to chunk, and nothing passes again

    def new_state(self, said: Said) -> Shots:
        return Shots()

    def start_pass(
        self, follower: Follower[Shots], start: int, frames: int, latents: Tensor, arguments: Arguments
    ) -> None:
        cache, frame = arguments["kv_cache"], follower.frame(start)
        offset = _whole_offset(arguments.get("temporal_offset", 0.0))
        if frame == 0:
            follower.state = Shots(offsets=((0, offset),))
        elif follower.block is not None:
            if start != follower.block.start:
                follower.state = _with_pin(follower.state, cache, frame, arguments["x"].shape[1] // frames)
            elif "global_end_index" in cache and int(cache["global_end_index"]) <= arguments["current_start"]:
                # The pipeline emptied its cache between two passes of a block.
                raise ValueError("shot_clean_recache is not supported with retrieval memory; turn it off")
        if follower.state.offsets[-1][1] != offset:
            follower.state = replace(follower.state, offsets=(*follower.state.offsets, (frame, offset)))
        follower.memory.scale_time(arguments.get("t_scale", 1.0))
        follower.follow(start, frames, latents, follower.state)


@dataclass(frozen=True)
class ShotPlan(ContextPlan):
    """The context in the presence of shots: what is pinned displaces local frames once it has left the window."""

    shots: Shots

    @property
    def local_columns(self) -> int:
        return max(self.frames, self.config.context_frames - self.config.memory_frames)

    @property
    def local(self) -> range:
        fixed = {*range(self.config.sink_frames), *self.shots.pinned}
        room = self.config.context_frames - self.config.memory_frames
        for first in range(max(0, self.end - room), self.start):
            if sum(frame < first for frame in fixed) + self.end - first <= room:
                return range(first, self.end)
        return range(self.start, self.end)

    @property
    def _pinned(self) -> list[int]:
        """Pinned frames outside the window."""
        return [frame for frame in self.shots.pinned if self.config.sink_frames <= frame < self.local.start]

    def keeps(self, frame: int) -> bool:
        return super().keeps(frame) or frame in self.shots.pinned

    def fixed_entries(self) -> tuple[list[int], list[int]]:
        frames, positions = super().fixed_entries()
        pinned, sink = self._pinned, self.config.sink_frames
        padding = [UNUSED] * (len(self.shots.pinned) - len(pinned))
        frames += pinned + padding
        if self.config.positions == "relative":
            return frames, [*positions, *range(sink, sink + len(pinned)), *padding]
        return frames, [frame if frame == UNUSED else frame + self.shots.offset(frame) for frame in frames]

    def query_positions(self) -> list[int]:
        if self.config.positions == "relative":
            return super().query_positions()
        return [frame + self.shots.offset(frame) for frame in range(self.start, self.end)]

    def unseen(self, frames: Tensor) -> Tensor:
        pinned = self._pinned
        return frames.masked_fill(torch.isin(frames, frames.new_tensor(pinned)), UNUSED) if pinned else frames

    def memory_positions(self, frames: Tensor) -> Tensor:
        positions = super().memory_positions(frames)
        if self.config.positions == "absolute":
            before = 0
            for first, offset in self.shots.offsets:
                positions = positions + (offset - before) * (frames >= first)
                before = offset
        return positions


def _whole_offset(offset: float | Tensor) -> int:
    if isinstance(offset, Tensor) and offset.ndim:
        raise ValueError(f"temporal_offset must be one number for the block, got a tensor {list(offset.shape)}")
    if offset != int(offset):
        raise ValueError(f"temporal_offset must be a whole number of latent frames, got {float(offset)}")
    return int(offset)


def _with_pin(shots: Shots, cache: dict[str, Tensor], frame: int, tokens: int) -> Shots:
    """Take over what the pipeline pinned after the last block; `frame` is the next one, `tokens` those of a frame."""
    if "pinned_start" not in cache or int(cache["pinned_start"]) < 0:
        return shots
    first = frame - (int(cache["local_end_index"]) - int(cache["pinned_start"])) // tokens
    # Once a pin is taken over, a later one at the same place of the cache has to be told from it.
    cache["pinned_start"].fill_(UNUSED)
    return replace(shots, pinned=range(first, first + int(cache["pinned_len"]) // tokens))
