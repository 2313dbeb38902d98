"""krea realtime: before each block, the newest frames pass again in one call and refill the cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from longlive_rag.backbones.family import CausalTransformer
from longlive_rag.backbones.follow import Follower
from longlive_rag.backbones.own_context import Said
from longlive_rag.backbones.wan import WanFamily
from longlive_rag.backbones.wan_attention import Arguments
from longlive_rag.config import Positions


@dataclass
class Refill:
    """What the pass that fills the cache says about the block after it."""

    next_start: int | None = None
    """First frame of that block, by the memory's count."""


class Krea(WanFamily):
    """Frames are numbered from the left end of the cache in each block, so the memory keeps its own count.

    The pass that fills the cache is the model's own; the keys that it makes are the frames' keys from then on.
    """

    name = "krea realtime"
    attributes = frozenset({"fused_projections"})
    has_clean_pass = False
    reads_cache = True

    def sink(self, said: Said) -> int:
        return 1  # the first frame of the video comes first in every cache that is filled

    def positions(self, said: Said, transformer: CausalTransformer) -> Positions:
        return "relative"

    def new_state(self, said: Said) -> Refill:
        return Refill()

    def recomputes(
        self, follower: Follower[Refill], frames: int, latents: Tensor, arguments: Arguments
    ) -> Iterable[int] | None:
        if arguments.get("block_mask") is None:
            return None
        block = follower.block
        if block is None:
            # A video that goes on from given latents.
            follower.restart()
            follower.follow(0, frames, latents)
            return range(frames)
        if frames < min(block.stop, len(block) + 1):
            raise ValueError(
                f"kv_cache_num_frames must be at least {len(block) + 1}, a block and the first frame, so that every "
                f"frame gets clean keys, got {frames}"
            )
        follower.state.next_start = block.stop
        return [0, *range(block.stop - frames + 1, block.stop)]

    def start_pass(
        self, follower: Follower[Refill], start: int, frames: int, latents: Tensor, arguments: Arguments
    ) -> None:
        if start and follower.block is not None:
            refilled = follower.state.next_start
            start = follower.block.stop if refilled is None else refilled
        follower.follow(start, frames, latents)
